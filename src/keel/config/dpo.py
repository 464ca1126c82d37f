"""Settings of `keel dpo`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from keel.config.sections import Count, Positive
from keel.config.supervised import ComparisonSettings, SupervisedOptim


class DpoOptim(SupervisedOptim):
    learning_rate: Positive = 5e-6
    """peak learning rate of AdamW"""


class DpoConfig(ComparisonSettings):
    """Settings of `keel dpo`: learn a policy from pairs or rankings directly, without a reward model."""

    output: str
    """the run folder; the result is in output/policy"""
    loss: Literal["sigmoid", "ipo", "listwise"] = "sigmoid"
    """DPO on pairs (rankings are turned into pairs), IPO on pairs, or Plackett-Luce DPO on whole rankings"""
    beta: Positive = 0.1
    """weight of the KL to the start, as kl_coef in `keel train`: larger stays closer"""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """chance that a comparison is the wrong way round (sigmoid only)"""
    max_tokens: Count = 512
    """of prompt and answer together; a longer prompt loses its beginning (a chat its oldest turns), an answer that does
    not fit is refused"""
    optim: DpoOptim = DpoOptim()

    @model_validator(mode="after")
    def _fits_together(self) -> "DpoConfig":
        if self.loss != "sigmoid" and self.label_smoothing:
            raise ValueError(f"label_smoothing belongs to loss: sigmoid; {self.loss} has no place for it")
        if self.loss == "listwise" and self.ties == "half":
            raise ValueError("ties: half belongs to pairs; the listwise loss reads ties as unknown order")
        return self
