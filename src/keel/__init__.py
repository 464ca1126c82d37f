"""keel trains language models from human feedback (RLHF).

Each command is a function here: `keel.sft`, `reward`, `dpo`, `train`, `sample`, `evaluate`, `doctor`. `PolicyTrainer`
is for training loops that you write. `keel.core` has the formulas as functions of tensors.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from keel.api import (
    EvaluationResult,
    SamplingResult,
    TrainingResult,
    doctor,
    dpo,
    evaluate,
    reward,
    sample,
    sft,
    train,
)

if TYPE_CHECKING:
    from keel import core as core
    from keel.training.trainer import PolicyTrainer as PolicyTrainer

__all__ = [
    "EvaluationResult",
    "PolicyTrainer",
    "SamplingResult",
    "TrainingResult",
    "core",
    "doctor",
    "dpo",
    "evaluate",
    "reward",
    "sample",
    "sft",
    "train",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what needs torch on first access, so that `import keel` stays fast."""
    if name == "core":
        return import_module("keel.core")
    if name == "PolicyTrainer":
        return import_module("keel.training.trainer").PolicyTrainer
    raise AttributeError(f"module 'keel' has no attribute {name!r}")
