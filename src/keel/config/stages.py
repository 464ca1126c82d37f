"""Settings of the verbs besides `keel train`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from keel.config.parts import (
    CheckpointSettings,
    Count,
    CountOrNone,
    Fraction,
    LogSettings,
    LoraSettings,
    NonNegative,
    OptimSettings,
    Positive,
    PromptSettings,
    RewardSource,
    Settings,
)


class DataSettings(Settings):
    path: str
    """JSON lines, Parquet, or a hub data set"""
    split: str = "train"
    """which split of a hub data set"""
    eval_path: str | None = None
    """held-out rows; without it a share of the prompts is held out"""
    eval_fraction: Fraction = 0.1
    """share of the prompts held out when there is no eval_path; 0 = none"""


class SupervisedSettings(Settings):
    """What `keel sft` and `keel reward` have in common."""

    output: str
    """the run folder; the result is in output/model"""
    seed: int = 0
    """of every random stream"""
    model: str
    """a folder or hub id: the weights to start from"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """number format of the weights"""
    lora: LoraSettings | None = None
    """train a low-rank adapter, merged into the weights at the end (of `keel reward` also in output/model/adapter)"""
    gradient_checkpointing: bool = False
    """compute each layer once more in the backward pass instead of keeping what it computed"""
    data: DataSettings
    epochs: Positive = 1.0
    """passes over the data; fractions are allowed"""
    batch_size: Count = 32
    """rows per optimizer step"""
    microbatch_tokens: Count = 16_384
    """padded tokens per forward pass; never changes the result"""
    max_tokens: Count = 512
    """longer texts lose their beginning (sft: their end)"""
    optim: OptimSettings = OptimSettings(learning_rate=5e-5, schedule="cosine")
    checkpoint: CheckpointSettings = CheckpointSettings(every=0)
    log: LogSettings = LogSettings()


class SftConfig(SupervisedSettings):
    """Settings of `keel sft`: imitate completions (rows of prompt, completion) or plain text (rows of text)."""


class RewardConfig(SupervisedSettings):
    """Settings of `keel reward`: train a reward model on pairs or rankings."""

    loss: Literal["pairwise", "listwise"] = "pairwise"
    """Bradley-Terry on pairs (rankings are turned into pairs), or Plackett-Luce on whole rankings"""
    center_coef: NonNegative = 0.01
    """pulls the scores of each prompt's answers towards a mean of zero"""
    template: str = "{prompt}{response}"
    """how prompt and response become one text when the prompt is no chat"""


class DecodingSettings(Settings):
    num_responses: Count = 1
    """answers per prompt"""
    batch_size: Count = 64
    """responses sampled at once"""
    max_response_tokens: Count = 64
    """longest response"""
    temperature: Positive = 1.0
    """sampling temperature"""
    top_k: CountOrNone = 0
    """sample among the k most likely tokens; 0 = all"""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """sample among the most likely tokens that together hold this probability"""
    stop: list[str] = []
    """further tokens that end a response"""


class SampleConfig(Settings):
    """Settings of `keel sample`: write a model's answers to a file of `prompt, responses` rows."""

    model: str
    """a folder or hub id"""
    prompts: PromptSettings
    output: str = "samples.jsonl"
    """the file to write"""
    seed: int = 0
    """of sampling"""
    sampling: DecodingSettings = DecodingSettings()


class EvaluateConfig(Settings):
    """Settings of `keel evaluate`: judge a policy, alone and against another, on prompts it was not trained on."""

    policy: str
    """folder or hub id of the policy to judge"""
    against: str | None = None
    """folder of another policy: adds its figures and the win rate against it"""
    reference: str | None = None
    """folder that the KL is measured to (default: `against`)"""
    prompts: PromptSettings
    rewards: list[RewardSource] = []
    """the scorers; their weighted sum is the score"""
    output: str | None = None
    """write figures and answers (JSON) to this file"""
    seed: int = 0
    """of sampling and of the bootstrap"""
    sampling: DecodingSettings = DecodingSettings()


class QuickstartConfig(Settings):
    """Settings of `keel quickstart`: the whole loop on an embedded world."""

    output: str = "runs/quickstart"
    """the folder for everything it makes"""
    seed: int = 0
    """of the world and of every random stream"""
    algorithm: Literal["ppo", "a2c"] = "ppo"
    """how the policy learns"""


class ServeRewardConfig(Settings):
    """Settings of `keel serve-reward`: a scorer for other processes."""

    model: str | None = None
    """folder or hub id of a reward model"""
    function: str | None = None
    """FILE.py:NAME of a Python reward function"""
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
        if self.host in ("0.0.0.0", "::") and not self.names:
            raise ValueError(f"host {self.host} needs names, those that clients call it by")
        return self

    @property
    def source(self) -> RewardSource:
        return RewardSource(model=self.model, function=self.function)
