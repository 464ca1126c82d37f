"""Settings of `keel serve-reward`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from keel.config.base import Count, Dtype, NonNegative, Settings
from keel.config.sections import RewardSource, check_host_names


class ServeRewardConfig(Settings):
    """Settings of `keel serve-reward`: serve a scorer to other processes over HTTP."""

    model: str | None = None
    """Folder or hub id of a reward model to serve; give either this or `function`"""
    function: str | None = None
    """FILE.py:NAME of a Python reward function to serve"""
    combine: Literal["mean", "min", "lower"] = "mean"
    """Score of an ensemble of reward models: mean or minimum of its members, or lower: mean - std_coef * standard
    deviation"""
    std_coef: NonNegative = 1.0
    """Number of standard deviations to subtract, with combine: lower"""
    dtype: Dtype = "float32"
    """Number format of the weights of a reward model; bfloat16 takes half the memory"""
    host: str = "127.0.0.1"
    """Address to listen on; an address that other machines can reach needs `public`"""
    public: bool = False
    """Allow an address that other machines can reach"""
    names: list[str] = []
    """More host names or addresses of this server; required for 0.0.0.0"""
    port: Annotated[int, Field(ge=1, le=65535)] = 5000
    """Port to listen on"""
    max_rows: Count = 4096
    """Largest number of responses in a request"""
    max_body_mb: Count = 16
    """Largest body of a request, in MB"""
    max_waiting: Count = 16
    """Largest number of requests that may wait while one is scored"""

    @model_validator(mode="after")
    def _check_combinations(self) -> "ServeRewardConfig":
        if (self.model is None) == (self.function is None):
            raise ValueError("set exactly one of model, function")
        if self.dtype != "float32" and self.model is None:
            raise ValueError("dtype needs model; remove it for a function")
        check_host_names(self.host, self.names)
        return self

    @property
    def source(self) -> RewardSource:
        shared = ("model", "function", "combine", "std_coef", "dtype")
        return RewardSource(**{name: getattr(self, name) for name in shared})
