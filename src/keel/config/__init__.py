"""Settings of every verb, as frozen pydantic models. No torch here: help and errors must be fast."""

from keel.config.base import Settings
from keel.config.data_check import DataCheckConfig
from keel.config.doctor import DoctorConfig
from keel.config.dpo import DpoConfig
from keel.config.drift import DriftConfig
from keel.config.evaluate import EvaluateConfig
from keel.config.parsing import LISTS_OF_SECTIONS, parse, section_class, section_error, setting_names, suggestion
from keel.config.plan import PlanConfig
from keel.config.quickstart import QuickstartConfig
from keel.config.rank import RankConfig
from keel.config.report import ReportConfig
from keel.config.reward import GATES, RewardConfig
from keel.config.rollout import RolloutSettings, VllmSettings
from keel.config.sample import SampleConfig
from keel.config.sections import (
    ChatSettings,
    CheckpointSettings,
    DecodingSettings,
    LogSettings,
    LoraSettings,
    ModelSettings,
    OptimSettings,
    PromptSettings,
    RewardSource,
    scorer_names,
)
from keel.config.serve import ServeConfig
from keel.config.serve_reward import ServeRewardConfig
from keel.config.sft import SftConfig
from keel.config.supervised import ComparisonSettings, DataSettings, SupervisedSettings
from keel.config.train import AlgorithmSettings, TrainConfig
from keel.config.training_prompts import PromptFile, TrainPrompts

__all__ = [
    "GATES",
    "LISTS_OF_SECTIONS",
    "AlgorithmSettings",
    "ChatSettings",
    "CheckpointSettings",
    "ComparisonSettings",
    "DataCheckConfig",
    "DataSettings",
    "DecodingSettings",
    "DoctorConfig",
    "DpoConfig",
    "DriftConfig",
    "EvaluateConfig",
    "LogSettings",
    "LoraSettings",
    "ModelSettings",
    "OptimSettings",
    "PlanConfig",
    "PromptFile",
    "PromptSettings",
    "QuickstartConfig",
    "RankConfig",
    "ReportConfig",
    "RewardConfig",
    "RewardSource",
    "RolloutSettings",
    "SampleConfig",
    "ServeConfig",
    "ServeRewardConfig",
    "Settings",
    "SftConfig",
    "SupervisedSettings",
    "TrainConfig",
    "TrainPrompts",
    "VllmSettings",
    "parse",
    "scorer_names",
    "section_class",
    "section_error",
    "setting_names",
    "suggestion",
]
