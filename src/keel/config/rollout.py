"""Settings of how a policy samples its responses during training."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from keel.config.base import Count, CountOrNone, Dtype, Positive, Settings


class VllmServerSettings(Settings):
    python: str | None = None
    """Python interpreter of the environment that has vLLM (default: the interpreter of keel)"""
    dtype: Dtype | None = None
    """Number format in which vLLM computes (default: policy.dtype)"""
    devices: str | None = None
    """Number of the GPU for vLLM (default: the GPU of the policy)"""
    memory: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.4
    """Share of the GPU's memory for vLLM's weights and cache"""
    timeout_seconds: Positive = 600.0
    """Deadline of the start of vLLM, of an update of its weights, and of a batch of responses"""


class VllmSettings(VllmServerSettings):
    sleep: bool = True
    """Free vLLM's GPU memory while the policy is trained; it has no effect on a CPU, and none with `devices`"""


EngineName = Literal["keel", "vllm"]


def check_engine_settings(engine: str, vllm: VllmServerSettings, prefix: str = "") -> None:
    """Raise ValueError for settings of vLLM that have no effect."""
    if engine == "keel" and vllm != type(vllm)():
        raise ValueError(f"the settings of {prefix}vllm need {prefix}engine: vllm; set it, or remove them")


class RolloutSettings(Settings):
    batch_size: Count = 64
    """Responses in each step, of all processes together"""
    group_size: Count | None = None
    """Responses to each prompt (default: 4 for rloo, grpo and reinforce++_base, else 1)"""
    resample_rounds: CountOrNone = 0
    """Largest number of times in a step that groups of equal scores, from which nothing is learned, are replaced by
    responses to new prompts (dynamic sampling, DAPO); 0 = keep them. Then the step continues with the groups it has
    (algorithms that compare groups)"""
    max_response_tokens: Count = 64
    """Longest response, in tokens"""
    temperature: Positive = 1.0
    """Temperature of sampling and of all log-probabilities"""
    correction_cap: Annotated[float, Field(ge=1.0)] | None = 2.0
    """Largest weight of a token whose policy loss is corrected for differences of the sampler's log-probability from
    the trainer's; null: no correction"""
    stop: list[str] = []
    """Texts that end a response, in addition to the end tokens of the model"""
    stop_in_text: bool = True
    """Include an end token that is ordinary text, such as a full stop, in the text that scorers and logs see"""
    engine: EngineName = "keel"
    """What samples the responses: keel's sampler, or vLLM in a separate process"""
    vllm: VllmSettings = VllmSettings()

    @model_validator(mode="after")
    def _check_engine(self) -> "RolloutSettings":
        check_engine_settings(self.engine, self.vllm, "rollout.")
        return self
