"""Sections of settings that several verbs share. Frozen data: no torch, nothing here acts.

A line under a field is its help text.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class LoraSettings(Settings):
    r: Count = 16
    """rank of the adapter"""
    alpha: Count = 32
    """scale of the adapter: it is multiplied by alpha / r"""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """names of the layers that get an adapter"""


class ModelSettings(Settings):
    model: str
    """a folder or hub id of any transformers causal language model"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """number format of the weights"""
    lora: LoraSettings | None = None
    """train a low-rank adapter instead of all weights (needs `pip install keel-rlhf[peft]`); a separate critic learns
    one as well, and policy, reference and critic share one base"""
    gradient_checkpointing: bool = False
    """compute each layer once more in the backward pass instead of keeping what it computed: a third more work"""


class PromptSettings(Settings):
    path: str
    """JSON lines, Parquet, or a hub data set with one prompt a row"""
    split: str = "train"
    """which split of a hub data set"""
    column: str = "prompt"
    """the column that holds the prompt (text, or a list of chat messages)"""
    max_tokens: Count = 512
    """longest prompt allowed"""
    too_long: Literal["error", "drop", "truncate"] = "error"
    """what to do with a longer one; truncate keeps its end"""


class RewardSource(Settings):
    """One scorer: exactly one of model, function, url."""

    model: str | None = None
    """folder or hub id of a reward model (sequence classification, one label), with its own tokenizer; or the folder of
    a peft adapter of one, which shares the memory of its base with the policy's or the reference"""
    function: str | None = None
    """FILE.py:NAME of a Python function with the signature of TRL's reward functions, sync or async"""
    url: str | None = None
    """HTTP scorer: POST {"query": [...], "prompts": [...]} -> {"rewards": [...]}"""
    weight: float = 1.0
    """its weight in the sum of all scorers"""
    noisy: bool = False
    """the same answer may get another score: skips the self-check's repetition"""
    timeout_seconds: Positive = 60.0
    """deadline for one batch of an HTTP scorer, retries included"""
    combine: Literal["mean", "min", "lower"] = "mean"
    """score of an ensemble of reward models: mean or minimum over its members, or mean - std_coef * their deviation"""
    std_coef: NonNegative = 1.0
    """with combine: lower"""
    ungated: bool = False
    """use a reward model although it failed its gate"""

    @model_validator(mode="after")
    def _exactly_one(self) -> "RewardSource":
        if sum(kind is not None for kind in (self.model, self.function, self.url)) != 1:
            raise ValueError("give exactly one of model, function, url")
        return self

    @property
    def name(self) -> str:
        """Short name for metric keys."""
        address = (self.url or "").partition("?")[0]
        source = self.function.rpartition(":")[2] if self.function else (self.model or address)
        return source.rstrip("/").rpartition("/")[2] or source


class OptimSettings(Settings):
    learning_rate: Positive = 1e-5
    """peak learning rate of AdamW"""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """shape after the warm-up; linear and cosine end at zero"""
    warmup_steps: CountOrNone = 0
    """optimizer steps of linear warm-up"""
    weight_decay: NonNegative = 0.0
    """decoupled weight decay"""
    max_grad_norm: Positive = 1.0
    """gradients of each model are clipped to this norm"""
    eps: Positive = 1e-8
    """epsilon of AdamW (torch form: added to the bias-corrected root)"""
    on_fault: Literal["stop", "skip"] = "stop"
    """an update with a loss or gradient that is not finite, or a gradient that jumps: stop before it, or skip it"""
    max_skips: Count = 3
    """more skipped updates in a row stop the run"""
    spike: Annotated[float, Field(gt=1.0)] | None = None
    """a gradient jumps when its norm is this many times the mean of those before it (null = never)"""


class CheckpointSettings(Settings):
    every: CountOrNone = 20
    """steps between checkpoints; 0 = only at the end"""
    keep: CountOrNone = 2
    """how many to keep; 0 = all"""
    keep_final: bool = True
    """keep them when the run has finished: they are most of its size, but without them it cannot take more steps"""


class LogSettings(Settings):
    trackers: list[Literal["tensorboard"]] = []
    """also write metrics to these"""
