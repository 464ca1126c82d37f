"""Settings of `keel serve-reward`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from keel.config.sections import Count, Dtype, NonNegative, RewardSource, Settings, check_host_names


class ServeRewardConfig(Settings):
    """Settings of `keel serve-reward`: a scorer for other processes."""

    model: str | None = None
    """folder or hub id of a reward model"""
    function: str | None = None
    """FILE.py:NAME of a Python reward function"""
    combine: Literal["mean", "min", "lower"] = "mean"
    """score of an ensemble of reward models: mean or minimum over its members, or mean - std_coef * their deviation"""
    std_coef: NonNegative = 1.0
    """with combine: lower"""
    dtype: Dtype = "float32"
    """number format of a reward model's weights; bfloat16 takes half the memory"""
    host: str = "127.0.0.1"
    """address to listen on; one that other machines can reach needs `public`"""
    public: bool = False
    """allow an address that other machines can reach"""
    names: list[str] = []
    """further names or addresses under which clients call it; needed for 0.0.0.0, which is nobody's name"""
    port: Annotated[int, Field(ge=1, le=65535)] = 5000
    """port to listen on"""
    max_rows: Count = 4096
    """most answers in a request"""
    max_body_mb: Count = 16
    """largest body of a request"""
    max_waiting: Count = 16
    """requests that may wait while one is answered"""

    @model_validator(mode="after")
    def _exactly_one(self) -> "ServeRewardConfig":
        if (self.model is None) == (self.function is None):
            raise ValueError("give exactly one of model, function")
        if self.dtype != "float32" and self.model is None:
            raise ValueError("dtype is for a reward model")
        check_host_names(self.host, self.names)
        return self

    @property
    def source(self) -> RewardSource:
        shared = ("model", "function", "combine", "std_coef", "dtype")
        return RewardSource(**{name: getattr(self, name) for name in shared})
