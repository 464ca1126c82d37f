"""Settings of `keel plan`."""

from keel.config.sections import Count, Positive
from keel.config.train import TrainConfig


class PlanConfig(TrainConfig):
    """Settings of `keel plan`: a run of `keel train`, and what to expect of it."""

    response_tokens: Count | None = None
    """mean length of a response to reckon with (default: rollout.max_response_tokens)"""
    memory_gb: Positive | None = None
    """memory to fit into, in GB of 10^9 bytes (default: this machine's)"""
