"""Settings that `keel sft`, `keel reward` and `keel dpo` share.

A section whose defaults differ from those of `keel train` is a class of its own: one setting given leaves the others.
"""

from typing import Literal

from keel.config.sections import (
    ChatSettings,
    CheckpointSettings,
    Count,
    CountOrNone,
    Dtype,
    Fraction,
    LogSettings,
    LoraSettings,
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


class ComparisonSettings(SupervisedSettings):
    """What `keel reward` and `keel dpo` have in common: they learn from comparisons."""

    ties: Literal["ignore", "half"] = "ignore"
    """two answers with the same rank: say nothing, or are half a win for each (pairs only)"""
