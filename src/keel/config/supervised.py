"""Settings that `keel sft`, `keel reward` and `keel dpo` share.

A section whose defaults differ from those of `keel train` is a separate class. With an instance such as
`OptimSettings(schedule="cosine")` as the default, setting one value of the section would reset the others.
"""

from typing import Literal

from pydantic import model_validator

from keel.config.base import Count, CountOrNone, Dtype, Fraction, Positive, Quantization, Settings
from keel.config.sections import (
    ChatSettings,
    CheckpointSettings,
    LogSettings,
    LoraSettings,
    OptimSettings,
    ParallelSettings,
    check_quantization,
)


class DataSettings(ChatSettings):
    path: str
    """File of JSON lines or Parquet, or hub data set, with the training rows"""
    split: str = "train"
    """Split of a hub data set"""
    eval_path: str | None = None
    """File of held-out rows (default: a share of the prompts is held out)"""
    eval_fraction: Fraction = 0.1
    """Share of the prompts to hold out when there is no eval_path; 0 = none"""
    watch_fraction: Fraction = 0.1
    """With `patience`: share of the remaining prompts that only decides when to stop, so that the held-out metrics stay
    unbiased"""


class SupervisedOptim(OptimSettings):
    learning_rate: Positive = 5e-5
    """Peak learning rate of AdamW"""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the learning rate after the warm-up; linear and cosine end at zero"""


class SupervisedCheckpoint(CheckpointSettings):
    every: CountOrNone = 0
    """Steps between checkpoints; 0 = only at the end"""


class SupervisedSettings(Settings):
    """Settings that `keel sft`, `keel reward` and `keel dpo` share."""

    output: str
    """Run folder; the result is saved in its folder model"""
    seed: int = 0
    """Random seed"""
    model: str
    """Folder or hub id of the model to start from"""
    dtype: Dtype = "float32"
    """Number format for computing. Trained weights, gradients and optimizer moments are float32 in any case"""
    lora: LoraSettings | None = None
    """Train a low-rank adapter (needs `pip install peft`), which is merged into the weights at the end; `keel reward`
    also saves it in model/adapter"""
    quantization: Quantization | None = None
    """Quantize the frozen base of the LoRA adapter: nf4 (4 bits a weight) or int8 (needs `pip install bitsandbytes`).
    Embeddings, norms and heads keep their weights"""
    gradient_checkpointing: bool = False
    """Save memory by computing each layer again in the backward pass, for a third more work"""
    data: DataSettings
    epochs: Positive = 1.0
    """Passes over the data; fractions are allowed"""
    batch_size: Count = 32
    """Rows in each optimizer step"""
    microbatch_tokens: Count = 16_384
    """Padded tokens in each forward pass; lower it to save memory, it never changes the result"""
    max_tokens: Count = 512
    """Longest row, in tokens; a longer chat loses its oldest turns, a longer text its beginning (`keel sft` then cuts
    the end, if a row is still too long)"""
    patience: CountOrNone = 0
    """Stop after this many evaluations in a row without a lower loss on the watched prompts, and keep the weights with
    the lowest loss; 0 = never stop early"""
    eval_every: CountOrNone = 0
    """Optimizer steps between evaluations; 0 = after each pass over the data"""
    optim: SupervisedOptim = SupervisedOptim()
    parallel: ParallelSettings = ParallelSettings()
    checkpoint: SupervisedCheckpoint = SupervisedCheckpoint()
    log: LogSettings = LogSettings()

    @model_validator(mode="after")
    def _check_quantization(self) -> "SupervisedSettings":
        check_quantization(self.quantization, self.lora)
        return self


class ComparisonSettings(SupervisedSettings):
    """Settings that `keel reward` and `keel dpo` share: both learn from comparisons."""

    ties: Literal["ignore", "half"] = "ignore"
    """How to use two responses with the same rank: ignore, or half a win for each (pairs only)"""
