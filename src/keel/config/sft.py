"""Settings of `keel sft`."""

from typing import Literal

from keel.config.supervised import SupervisedSettings


class SftConfig(SupervisedSettings):
    """Settings of `keel sft`: imitate the assistant of conversations, completions, or plain text."""

    turns: Literal["all", "last"] = "all"
    """turns of the assistant that are learned in a conversation; those of others never are"""
