"""Settings of the verbs that learn from rows whose right answer is known: `keel sft`, `keel reward`, `keel dpo`.

A section whose defaults differ from those of `keel train` is a class of its own: one setting given leaves the others.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from keel.config.sections import (
    ChatSettings,
    CheckpointSettings,
    Count,
    CountOrNone,
    Dtype,
    Fraction,
    LogSettings,
    LoraSettings,
    NonNegative,
    OptimSettings,
    Positive,
    Settings,
)


class DataSettings(ChatSettings):
    path: str
    """JSON lines, Parquet, or a hub data set"""
    split: str = "train"
    """which split of a hub data set"""
    eval_path: str | None = None
    """held-out rows; without it a share of the prompts is held out"""
    eval_fraction: Fraction = 0.1
    """share of the prompts held out when there is no eval_path; 0 = none"""
    watch_fraction: Fraction = 0.1
    """with patience: share of the other prompts that only say when to stop, so that the held-out ones judge fairly"""


class SupervisedOptim(OptimSettings):
    learning_rate: Positive = 5e-5
    """peak learning rate of AdamW"""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """shape after the warm-up; linear and cosine end at zero"""


class DpoOptim(SupervisedOptim):
    learning_rate: Positive = 5e-6
    """peak learning rate of AdamW"""


class AtTheEnd(CheckpointSettings):
    every: CountOrNone = 0
    """steps between checkpoints; 0 = only at the end"""


class SupervisedSettings(Settings):
    """What `keel sft`, `keel reward` and `keel dpo` have in common."""

    output: str
    """the run folder; the result is in output/model"""
    seed: int = 0
    """of every random stream"""
    model: str
    """a folder or hub id: the weights to start from"""
    dtype: Dtype = "float32"
    """number format of the weights"""
    lora: LoraSettings | None = None
    """train a low-rank adapter, merged into the weights at the end (of `keel reward` also in output/model/adapter)"""
    gradient_checkpointing: bool = False
    """compute each layer once more in the backward pass instead of keeping what it computed"""
    data: DataSettings
    epochs: Positive = 1.0
    """passes over the data; fractions are allowed"""
    batch_size: Count = 32
    """rows per optimizer step"""
    microbatch_tokens: Count = 16_384
    """padded tokens per forward pass; never changes the result"""
    max_tokens: Count = 512
    """of a row; a longer chat loses its oldest turns, a longer text its beginning (of sft, what still does not fit its
    end)"""
    patience: CountOrNone = 0
    """end after this many evaluations in a row without a lower loss on the watched prompts, and keep the weights that
    had the lowest; 0 = learn to the end and keep the last"""
    eval_every: CountOrNone = 0
    """optimizer steps between evaluations; 0 = after every pass over the data"""
    optim: SupervisedOptim = SupervisedOptim()
    checkpoint: AtTheEnd = AtTheEnd()
    log: LogSettings = LogSettings()


class SftConfig(SupervisedSettings):
    """Settings of `keel sft`: imitate the assistant of conversations, completions, or plain text."""

    turns: Literal["all", "last"] = "all"
    """turns of the assistant that are learned in a conversation; those of others never are"""


class ComparisonSettings(SupervisedSettings):
    """What `keel reward` and `keel dpo` have in common: they learn from comparisons."""

    ties: Literal["ignore", "half"] = "ignore"
    """two answers with the same rank: say nothing, or are half a win for each (pairs only)"""


# Name in a gate -> figure, and whether it has to be at least or at most what the gate says.
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

    loss: Literal["pairwise", "listwise"] = "pairwise"
    """Bradley-Terry on pairs (rankings are turned into pairs), or Plackett-Luce on whole rankings"""
    center_coef: NonNegative = 0.01
    """pulls the scores of each prompt's answers towards a mean of zero"""
    template: str = "{prompt}{response}"
    """how prompt and response become one text when the prompt is no chat (chats: data.chat_template)"""
    members: Count = 1
    """reward models in the ensemble; each has a head, an order of the data and a run folder of its own"""
    member_models: list[str] = []
    """weights that the members start from, in turn (default: all from `model`)"""
    calibrate: bool = False
    """divide the scores by the temperature that fits the held-out prompts, so that they are in nats"""
    gate: dict[str, float] = {}
    """what the held-out figures must reach, as in accuracy_low=0.6,ece=0.1 (also accuracy;
    ece_high, the upper end of the interval of ece; ahead_of_length; loss); `keel train` refuses a model that fails"""

    @model_validator(mode="after")
    def _fits_together(self) -> "RewardConfig":
        unknown = [name for name in self.gate if name not in GATES]
        if unknown:
            raise ValueError(f"gate: no figure is called {unknown[0]}; known: {', '.join(GATES)}")
        beyond = [name for name, bound in self.gate.items() if name != "loss" and abs(bound) > 1]
        if beyond:
            raise ValueError(f"gate: {beyond[0]} is a share, at most 1")
        if self.member_models and self.members == 1:
            raise ValueError("member_models are for an ensemble; set members")
        if self.loss == "listwise" and self.ties == "half":
            raise ValueError("ties: half belongs to loss: pairwise; the listwise loss reads ties as unknown order")
        if (self.calibrate or self.gate) and not (self.data.eval_path or self.data.eval_fraction):
            asked = "calibrate" if self.calibrate else "a gate"
            raise ValueError(f"{asked} needs held-out prompts; set data.eval_fraction or data.eval_path")
        return self


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
