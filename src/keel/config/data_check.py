"""Settings of `keel data check`."""

from typing import Literal

from pydantic import model_validator

from keel.config.sections import ChatSettings, Count, CountOrNone


class DataCheckConfig(ChatSettings):
    """Settings of `keel data check`: what is in a data file, and what is wrong with it."""

    path: str
    """JSON lines, Parquet, or a hub data set"""
    split: str = "train"
    """which split of a hub data set"""
    column: str = "prompt"
    """of a file of prompts: the column that holds them"""
    against: list[str] = []
    """other files that must not share prompts with it, such as the held-out rows"""
    convert: str | None = None
    """write the rows that can be used to this .jsonl file, as rankings of keel's own form"""
    model: str | None = None
    """folder or hub id of a model with whose tokenizer and chat template the rows are tried as well"""
    show: CountOrNone = 0
    """print so many rows as the model's tokens, what is learned or scored marked (needs `model`)"""
    max_tokens: Count = 512
    """with `model`: rows of more tokens are counted"""
    turns: Literal["all", "last"] = "all"
    """with `model`: turns of the assistant that `keel sft` learns in a conversation"""

    @model_validator(mode="after")
    def _fits_together(self) -> "DataCheckConfig":
        if self.show and self.model is None:
            raise ValueError("show: give the model whose tokens are shown")
        return self
