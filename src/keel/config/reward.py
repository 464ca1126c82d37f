"""Settings of `keel reward`."""

from typing import ClassVar, Literal

from pydantic import model_validator

from keel.config.base import Count, NonNegative
from keel.config.supervised import ComparisonSettings

# Name in a gate -> metric, and whether the threshold is a lower or an upper bound.
GATES = {
    "accuracy": ("accuracy", ">="),
    "accuracy_low": ("accuracy_low", ">="),
    "ahead_of_length": ("ahead_of_length", ">="),
    "loss": ("loss", "<="),
    "ece": ("calibration_error", "<="),
    "ece_high": ("calibration_error_high", "<="),
}


class RewardConfig(ComparisonSettings):
    """Settings of `keel reward`: train a reward model on pairs or rankings."""

    main_settings: ClassVar[tuple[str, ...]] = (
        "output",
        "model",
        "data.path",
        "data.eval_path",
        "loss",
        "members",
        "calibrate",
        "gate",
        "epochs",
        "batch_size",
        "max_tokens",
        "optim.learning_rate",
        "lora.r",
    )

    loss: Literal["pairwise", "listwise"] = "pairwise"
    """pairwise: Bradley-Terry on pairs (rankings are turned into pairs); listwise: Plackett-Luce on full rankings"""
    center_coef: NonNegative = 0.01
    """Weight of a penalty that pulls the mean score of each prompt's responses to zero"""
    template: str = "{prompt}{response}"
    """How prompt and response become one text when the prompt is not a chat (for chats: data.chat_template)"""
    members: Count = 1
    """Number of reward models in the ensemble; each has a separate head, data order and run folder"""
    member_models: list[str] = []
    """Models that the members start from, in turn (default: `model` for all)"""
    calibrate: bool = False
    """Divide the scores by the temperature that fits the held-out prompts, so that they are in nats"""
    gate: dict[str, float] = {}
    """Thresholds for the held-out metrics, as in accuracy_low=0.6,ece=0.1; `keel train` refuses a model that fails.
    Known: accuracy, accuracy_low, ahead_of_length, loss, ece, ece_high"""

    @model_validator(mode="after")
    def _check_combinations(self) -> "RewardConfig":
        unknown = [name for name in self.gate if name not in GATES]
        if unknown:
            raise ValueError(f"gate: unknown metric {unknown[0]}; known: {', '.join(GATES)}")
        beyond = [name for name, bound in self.gate.items() if name != "loss" and abs(bound) > 1]
        if beyond:
            raise ValueError(f"gate: {beyond[0]} is at most 1; give a fraction, not a percentage")
        if self.member_models and self.members == 1:
            raise ValueError("member_models needs an ensemble; set members to 2 or more")
        if self.loss == "listwise" and self.ties == "half":
            raise ValueError("ties: half needs loss: pairwise; the listwise loss treats ties as unknown order")
        if (self.calibrate or self.gate) and not (self.data.eval_path or self.data.eval_fraction):
            setting = "calibrate" if self.calibrate else "gate"
            raise ValueError(f"{setting} needs held-out prompts; set data.eval_fraction or data.eval_path")
        return self
