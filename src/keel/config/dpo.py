"""Settings of `keel dpo`."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from keel.config.sections import Count, Positive
from keel.config.supervised import ComparisonSettings, SupervisedOptim


class DpoOptim(SupervisedOptim):
    learning_rate: Positive = 5e-6
    """Peak learning rate of AdamW"""


class DpoConfig(ComparisonSettings):
    """Settings of `keel dpo`: train a policy on pairs or rankings directly, without a reward model."""

    main_settings: ClassVar[tuple[str, ...]] = (
        "output",
        "model",
        "data.path",
        "data.eval_path",
        "loss",
        "beta",
        "epochs",
        "batch_size",
        "max_tokens",
        "optim.learning_rate",
        "lora.r",
        "seed",
    )

    output: str
    """Run folder; the result is saved in its folder policy"""
    loss: Literal["sigmoid", "ipo", "listwise"] = "sigmoid"
    """sigmoid: DPO on pairs (rankings are turned into pairs); ipo: IPO on pairs; listwise: Plackett-Luce DPO on full
    rankings"""
    beta: Positive = 0.1
    """Weight of the KL to the initial model, like kl_coef in `keel train`: larger values stay closer to it"""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Probability that a comparison is the wrong way round (only for loss sigmoid)"""
    max_tokens: Count = 512
    """Longest prompt and response together, in tokens; a longer prompt loses its beginning (a chat its oldest turns),
    and a response that does not fit is refused"""
    optim: DpoOptim = DpoOptim()

    @model_validator(mode="after")
    def _fits_together(self) -> "DpoConfig":
        if self.loss != "sigmoid" and self.label_smoothing:
            raise ValueError(f"label_smoothing needs loss: sigmoid; remove it for {self.loss}")
        if self.loss == "listwise" and self.ties == "half":
            raise ValueError("ties: half needs pairs; the listwise loss treats ties as unknown order")
        return self
