"""All settings, as frozen data. Nothing here imports torch, so that help and errors come at once."""

from keel.config.looking import DoctorConfig, DriftConfig, ReportConfig, ServeConfig
from keel.config.sections import (
    ChatSettings,
    CheckpointSettings,
    LogSettings,
    LoraSettings,
    ModelSettings,
    OptimSettings,
    PromptSettings,
    RewardSource,
    Settings,
    scorer_names,
)
from keel.config.parsing import nearest, not_a_section, parse, setting_names
from keel.config.stages import (
    DataCheckConfig,
    DecodingSettings,
    EvaluateConfig,
    QuickstartConfig,
    RankConfig,
    SampleConfig,
    ServeRewardConfig,
)
from keel.config.supervised import (
    GATES,
    ComparisonSettings,
    DataSettings,
    DpoConfig,
    RewardConfig,
    SftConfig,
    SupervisedSettings,
)
from keel.config.train import AlgorithmSettings, PlanConfig, TrainConfig

__all__ = [
    "GATES",
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
    "PromptSettings",
    "QuickstartConfig",
    "RankConfig",
    "ReportConfig",
    "RewardConfig",
    "RewardSource",
    "SampleConfig",
    "ServeConfig",
    "ServeRewardConfig",
    "Settings",
    "SftConfig",
    "SupervisedSettings",
    "TrainConfig",
    "nearest",
    "not_a_section",
    "parse",
    "scorer_names",
    "setting_names",
]
