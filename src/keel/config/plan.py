"""Settings of `keel plan`."""

from typing import ClassVar

from keel.config.base import Count, Positive
from keel.config.train import TrainConfig


class PlanConfig(TrainConfig):
    """Settings of `keel plan`: forecast memory and time of a `keel train` run."""

    main_settings: ClassVar[tuple[str, ...]] = (
        "output",
        "policy.model",
        "policy.lora.r",
        "policy.gradient_checkpointing",
        "prompts.path",
        "rewards",
        "algorithm.name",
        "algorithm.microbatch_tokens",
        "steps",
        "rollout.batch_size",
        "rollout.max_response_tokens",
        "response_tokens",
        "devices",
        "memory_gb",
    )

    response_tokens: Count | None = None
    """Expected mean length of a response, in tokens (default: rollout.max_response_tokens)"""
    devices: Count = 1
    """Number of devices, one for each process; `parallel.shard` of them share one copy of the weights"""
    memory_gb: Positive | None = None
    """Available memory of each device, in GB of 10^9 bytes (default: that of this machine)"""
