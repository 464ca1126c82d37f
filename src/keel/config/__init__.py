"""All settings, as frozen data. Nothing here imports torch, so that help and errors come at once."""

from keel.config.parts import (
    CheckpointSettings,
    LogSettings,
    LoraSettings,
    ModelSettings,
    OptimSettings,
    PromptSettings,
    RewardSource,
    Settings,
)
from keel.config.reading import nearest, parse, setting_names
from keel.config.stages import (
    DataSettings,
    DecodingSettings,
    EvaluateConfig,
    QuickstartConfig,
    RewardConfig,
    SampleConfig,
    ServeRewardConfig,
    SftConfig,
    SupervisedSettings,
)
from keel.config.train import AlgorithmSettings, PlanConfig, TrainConfig

__all__ = [
    "AlgorithmSettings",
    "CheckpointSettings",
    "DataSettings",
    "DecodingSettings",
    "EvaluateConfig",
    "LogSettings",
    "LoraSettings",
    "ModelSettings",
    "OptimSettings",
    "PlanConfig",
    "PromptSettings",
    "QuickstartConfig",
    "RewardConfig",
    "RewardSource",
    "SampleConfig",
    "ServeRewardConfig",
    "Settings",
    "SftConfig",
    "SupervisedSettings",
    "TrainConfig",
    "nearest",
    "parse",
    "setting_names",
]
