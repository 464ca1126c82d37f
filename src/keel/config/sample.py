"""Settings of `keel sample`."""

from typing import ClassVar

from pydantic import model_validator

from keel.config.base import Dtype, Settings
from keel.config.rollout import EngineName, VllmServerSettings, check_engine_settings
from keel.config.sections import DecodingSettings, PromptSettings


class SampleConfig(Settings):
    """Settings of `keel sample`: write a model's responses to a file of `prompt, responses` rows."""

    main_settings: ClassVar[tuple[str, ...]] = (
        "model",
        "prompts.path",
        "prompts.column",
        "prompts.chat",
        "output",
        "sampling.num_responses",
        "sampling.max_response_tokens",
        "sampling.temperature",
        "sampling.top_p",
        "sampling.stop",
        "sampling.batch_size",
        "seed",
    )

    model: str
    """Folder or hub id of the model to sample from, or the address of an endpoint: http://HOST/v1#MODEL"""
    tokenizer: str | None = None
    """Folder or hub id of a model whose tokenizer reads the prompts for an endpoint"""
    dtype: Dtype = "float32"
    """Number format of the weights"""
    prompts: PromptSettings
    output: str = "samples.jsonl"
    """File to write the responses to"""
    seed: int = 0
    """Random seed of sampling"""
    sampling: DecodingSettings = DecodingSettings()
    engine: EngineName = "keel"
    """What samples the responses: keel's sampler, or vLLM in a separate process"""
    vllm: VllmServerSettings = VllmServerSettings()

    @model_validator(mode="after")
    def _check_engine(self) -> "SampleConfig":
        check_engine_settings(self.engine, self.vllm)
        return self
