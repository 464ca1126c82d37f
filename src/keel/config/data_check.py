"""Settings of `keel data check`."""

from typing import Literal

from pydantic import model_validator

from keel.config.base import Count, CountOrNone
from keel.config.sections import ChatSettings


class DataCheckConfig(ChatSettings):
    """Settings of `keel data check`: report the contents and the faults of a data file."""

    path: str
    """File of JSON lines or Parquet, or hub data set, to check"""
    split: str = "train"
    """Split of a hub data set"""
    column: str = "prompt"
    """Column that holds the prompt, in a file of prompts"""
    against: list[str] = []
    """Other files that must not share prompts with this one, such as the held-out rows"""
    convert: str | None = None
    """Write the usable rows to this .jsonl file, as rankings in keel's format"""
    model: str | None = None
    """Folder or hub id of a model: also read the rows with its tokenizer and chat template"""
    show: CountOrNone = 0
    """Number of rows to print as the tokens of `model`, with the learned or scored tokens marked"""
    max_tokens: Count = 512
    """With `model`: count the rows that have more tokens than this"""
    turns: Literal["all", "last"] = "all"
    """With `model`: assistant turns of a conversation that `keel sft` learns from"""

    @model_validator(mode="after")
    def _fits_together(self) -> "DataCheckConfig":
        if self.show and self.model is None:
            raise ValueError("show: set model, whose tokens are printed")
        return self
