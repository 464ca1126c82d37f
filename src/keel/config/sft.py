"""Settings of `keel sft`."""

from typing import ClassVar, Literal

from keel.config.supervised import SupervisedSettings


class SftConfig(SupervisedSettings):
    """Settings of `keel sft`: imitate the assistant in conversations, completions, or plain text."""

    main_settings: ClassVar[tuple[str, ...]] = (
        "output",
        "model",
        "data.path",
        "data.eval_path",
        "data.chat",
        "epochs",
        "batch_size",
        "max_tokens",
        "optim.learning_rate",
        "lora.r",
        "patience",
        "seed",
    )

    turns: Literal["all", "last"] = "all"
    """Assistant turns of a conversation to learn from; other messages are never learned"""
