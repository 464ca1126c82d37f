"""Settings of `keel sample`."""

from keel.config.sections import DecodingSettings, Dtype, PromptSettings, Settings


class SampleConfig(Settings):
    """Settings of `keel sample`: write a model's answers to a file of `prompt, responses` rows."""

    model: str
    """a folder or hub id"""
    dtype: Dtype = "float32"
    """number format of the weights"""
    prompts: PromptSettings
    output: str = "samples.jsonl"
    """the file to write"""
    seed: int = 0
    """of sampling"""
    sampling: DecodingSettings = DecodingSettings()
