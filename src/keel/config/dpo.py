"""Settings of `keel dpo`."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from keel.config.base import Count, NonNegative, Positive
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
    loss: Literal["sigmoid", "ipo", "listwise", "simpo", "orpo", "kto"] = "sigmoid"
    """sigmoid: DPO on pairs (rankings are turned into pairs); ipo: IPO on pairs; listwise: Plackett-Luce DPO on full
    rankings; simpo and orpo: SimPO and ORPO on pairs, without a reference; kto: KTO on single responses that are
    labelled as desirable or undesirable (rankings are turned into them)"""
    beta: Positive = 0.1
    """Weight of the KL to the initial model, like kl_coef in `keel train`: larger values stay closer to it. For simpo
    the scale of the rewards, for orpo the weight of the odds ratio"""
    length_normalized: bool = False
    """Divide the implicit reward of a response by its number of tokens (length-normalized DPO)"""
    target_margin: NonNegative = 0.0
    """Difference of the rewards of a pair to aim for: gamma of SimPO (only for loss sigmoid or simpo)"""
    nll_coef: NonNegative = 0.0
    """Weight of an added loss that keeps the best responses likely: minus the mean log-probability of their tokens"""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Probability that a comparison is the wrong way round (only for loss sigmoid or simpo)"""
    desirable_weight: Positive = 1.0
    """Weight of the loss of desirable responses (only for loss kto)"""
    undesirable_weight: Positive = 1.0
    """Weight of the loss of undesirable responses (only for loss kto)"""
    max_tokens: Count = 512
    """Longest prompt and response together, in tokens; a longer prompt loses its beginning (a chat its oldest turns),
    and a response that does not fit is refused"""
    optim: DpoOptim = DpoOptim()

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares with the initial model."""
        return self.loss not in ("simpo", "orpo")

    @property
    def nll_weight(self) -> float:
        """Weight of the NLL of the best responses, which is 1 in ORPO."""
        return 1.0 if self.loss == "orpo" else self.nll_coef

    @model_validator(mode="after")
    def _fits_together(self) -> "DpoConfig":
        for name in ("label_smoothing", "target_margin"):
            if self.loss not in ("sigmoid", "simpo") and getattr(self, name):
                raise ValueError(f"{name} needs loss: sigmoid or simpo; remove it for {self.loss}")
        if self.loss == "kto":
            for name, default in (("length_normalized", False), ("nll_coef", 0.0), ("ties", "ignore")):
                if getattr(self, name) != default:
                    raise ValueError(f"{name} needs a loss that compares responses; remove it for kto")
        elif (self.desirable_weight, self.undesirable_weight) != (1.0, 1.0):
            raise ValueError(f"desirable_weight and undesirable_weight need loss: kto; remove them for {self.loss}")
        if self.length_normalized and not self.has_reference:
            raise ValueError(f"{self.loss} always divides by the length of the response; remove length_normalized")
        if self.loss == "orpo" and self.nll_coef:
            raise ValueError("orpo has the term of nll_coef with weight 1; remove nll_coef, and set beta instead")
        if self.loss == "listwise" and self.ties == "half":
            raise ValueError("ties: half needs pairs; the listwise loss treats ties as unknown order")
        return self
