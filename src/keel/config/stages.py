"""Settings of the verbs that do not learn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from keel.config.sections import (
    ChatSettings,
    Count,
    CountOrNone,
    Dtype,
    NonNegative,
    PromptSettings,
    Rewards,
    RewardSource,
    Settings,
)


class DecodingSettings(Settings):
    num_responses: Count = 1
    """answers per prompt"""
    batch_size: Count = 64
    """responses sampled at once"""
    max_response_tokens: Count = 64
    """longest response"""
    temperature: NonNegative = 1.0
    """sampling temperature; 0 takes the most likely token (greedy decoding)"""
    top_k: CountOrNone = 0
    """sample among the k most likely tokens; 0 = all"""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """sample among the most likely tokens that together hold this probability"""
    stop: list[str] = []
    """texts that end a response, besides the model's own end tokens"""
    stop_in_text: bool = True
    """include an end that is ordinary text, such as a full stop, in the response's text"""


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


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class EvaluateConfig(Settings):
    """Settings of `keel evaluate`: judge policies, alone and against another, on prompts they were not trained on."""

    policy: Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)] = []
    """folder or hub id of the policy to judge; several get a column each"""
    checkpoints: str | None = None
    """instead: a run folder of keel train, whose start, checkpoints and result are judged; scorers, reference, length
    and temperature that are not given are those of the run"""
    against: str | None = None
    """folder of another policy: adds its figures and the win rate against it"""
    reference: str | None = None
    """folder that the KL is measured to (default: `against`)"""
    dtype: Dtype = "float32"
    """number format of the weights of policies and reference"""
    prompts: PromptSettings
    rewards: Rewards = []
    """the scorers; their weighted sum is the score"""
    judge: str | None = None
    """name of the scorer that decides who wins (default: the weighted sum)"""
    slices: list[str] = []
    """columns of the prompts, by whose values every figure is told apart"""
    best_of: CountOrNone = 0
    """what the best 1, 2, ... of so many answers to a prompt are worth; at most sampling.num_responses, 0 = none"""
    pairs: str | None = None
    """write a pair of answers to each prompt to this .jsonl file, for people to judge blindly with keel rank"""
    judgements: str | None = None
    """what keel rank exported of the `pairs`: adds the win rate by people"""
    gate: str | None = None
    """what a release must reach, as in "win_rate>=0.6, high(kl)<=20, slice[refund].score>=0"; or a file of such"""
    output: str | None = None
    """write figures and answers (JSON) to this file, and the verdict of the gate beside it"""
    seed: int = 0
    """of sampling and of the bootstrap"""
    sampling: DecodingSettings = DecodingSettings()

    @field_validator("policy")
    @classmethod
    def _each_once(cls, policies: list[str]) -> list[str]:
        if len({Path(policy) for policy in policies}) < len(policies):
            raise ValueError("the same policy is given twice")
        return policies

    @model_validator(mode="after")
    def _fits_together(self) -> "EvaluateConfig":
        if bool(self.policy) == (self.checkpoints is not None):
            raise ValueError("give either policy or checkpoints")
        for name in ("gate", "pairs"):
            if getattr(self, name) is not None and len(self.policy) != 1:
                raise ValueError(f"{name}: only with one policy")
        if self.pairs is not None and self.against is None:
            raise ValueError("pairs: needs `against`, whose answers stand beside the policy's")
        if self.judgements is not None and self.pairs is None:
            raise ValueError("judgements: give the `pairs` that were judged as well")
        if self.best_of > self.sampling.num_responses:
            raise ValueError(
                f"best_of: {self.best_of} of {self.sampling.num_responses} answers to a prompt; "
                "lower it, or raise sampling.num_responses"
            )
        return self


class QuickstartConfig(Settings):
    """Settings of `keel quickstart`: the whole loop on an embedded world."""

    output: str = "runs/quickstart"
    """the folder for everything it makes"""
    seed: int = 0
    """of the world and of every random stream"""
    algorithm: Literal["ppo", "a2c"] = "ppo"
    """how the policy learns"""
    human: bool = False
    """you rank the answers in a web page, instead of the simulated raters"""
    human_rankings: Count = 60
    """with human: how many are asked for; fewer will do"""


def check_names(host: str, names: Sequence[str]) -> None:
    """Raises ValueError for an address that is nobody's name, by which no client can call."""
    if host in ("0.0.0.0", "::") and not names:
        raise ValueError(f"host {host} needs names, those that clients call it by")


class RankConfig(Settings):
    """Settings of `keel rank`: people rank answers in a web page."""

    answers: str | None = None
    """rows of `prompt, responses` (2 to 9 answers), as `keel sample` writes them; needed to begin a store"""
    store: str = "ratings.db"
    """the SQLite file that holds answers, raters and rankings; a later call goes on with it"""
    raters: list[str] = ["me"]
    """names of the raters, each of whom gets a private link; those of an earlier call stay"""
    overlap: Count | None = None
    """raters who rank each item (default: 1, or what the store was told before)"""
    mode: Literal["rankings", "pairs"] = "rankings"
    """rank all answers of a row, or compare two at a time (rows of more are cut into pairs)"""
    instructions: str | None = None
    """a text file that raters see before they begin"""
    tags: list[str] = []
    """labels that a rater may put on an item"""
    seed: int = 0
    """of the order in which each rater sees the answers, and of the cutting into pairs"""
    host: str = "127.0.0.1"
    """address to listen on; one that other machines can reach needs `public`"""
    public: bool = False
    """allow an address that other machines can reach"""
    names: list[str] = []
    """further names or addresses under which raters call it, the first of them in the links; needed for 0.0.0.0, which
    is nobody's name"""
    address: Annotated[str, Field(pattern=r"^https?://[\w.\-\[\]:]+$")] | None = None
    """where raters find it behind a proxy that speaks TLS, as in https://rank.example"""
    port: Annotated[int, Field(ge=1, le=65535)] = 8642
    """port to listen on"""
    browser: bool = True
    """open the first rater's page in a browser"""
    export: str | None = None
    """write what was ranked to this file, and end"""
    backup: str | None = None
    """write a complete copy of the store to this new file, also while it is in use, and end"""
    form: Literal["rankings", "pairs"] = "rankings"
    """of the export: one row a ranking, or one a pair"""
    aggregate: bool = False
    """of the export: one consensus for each item, raters weighed by how well they agree (default: one row a rater)"""

    @model_validator(mode="after")
    def _has_a_name(self) -> "RankConfig":
        check_names(self.host, self.names)
        return self


class DataCheckConfig(ChatSettings):
    """Settings of `keel data check`: what is in a data file, and what is wrong with it."""

    path: str
    """JSON lines, Parquet, or a hub data set"""
    split: str = "train"
    """which split of a hub data set"""
    column: str = "prompt"
    """of a file of prompts: the column that holds them"""
    against: list[str] = []
    """other files that must not share prompts with it, such as the held-out rows"""
    convert: str | None = None
    """write the rows that can be used to this .jsonl file, as rankings of keel's own form"""
    model: str | None = None
    """folder or hub id of a model with whose tokenizer and chat template the rows are tried as well"""
    show: CountOrNone = 0
    """print so many rows as the model's tokens, what is learned or scored marked (needs `model`)"""
    max_tokens: Count = 512
    """with `model`: rows of more tokens are counted"""
    turns: Literal["all", "last"] = "all"
    """with `model`: turns of the assistant that `keel sft` learns in a conversation"""

    @model_validator(mode="after")
    def _fits_together(self) -> "DataCheckConfig":
        if self.show and self.model is None:
            raise ValueError("show: give the model whose tokens are shown")
        return self


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
        check_names(self.host, self.names)
        return self

    @property
    def source(self) -> RewardSource:
        shared = ("model", "function", "combine", "std_coef", "dtype")
        return RewardSource(**{name: getattr(self, name) for name in shared})
