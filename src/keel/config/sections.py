"""Sections of settings that several verbs share. Frozen data: no torch, nothing here acts.

A line under a field is its help text.
"""

import json
from collections.abc import Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from keel.naming import clashing, clean_name, free_name

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]
Dtype = Literal["float32", "bfloat16"]


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class LoraSettings(Settings):
    r: Count = 16
    """rank of the adapter"""
    alpha: Count = 32
    """scale of the adapter: it is multiplied by alpha / r"""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """names of the layers that get an adapter"""


class ModelSettings(Settings):
    model: str
    """a folder or hub id of any transformers causal language model"""
    dtype: Dtype = "float32"
    """number format of the weights"""
    lora: LoraSettings | None = None
    """train a low-rank adapter instead of all weights (needs `pip install peft`); a separate critic learns one as well,
    and policy, reference and critic share one base"""
    gradient_checkpointing: bool = False
    """compute each layer once more in the backward pass instead of keeping what it computed: a third more work"""


def _scalars(value: Any) -> Any:
    """A command line gives text: `false` means no, `3` a number."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return value
    if not isinstance(value, dict):
        return value
    return {name: _scalar(entry) for name, entry in value.items()}


def _scalar(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    words = {"true": True, "false": False, "null": None}
    if value.lower() in words:
        return words[value.lower()]
    try:
        return int(value)
    except ValueError:
        return value


TemplateSettings = Annotated[
    dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], bool | int | float | str | None], BeforeValidator(_scalars)
]


class ChatSettings(Settings):
    """How prompts are put to a chat model."""

    chat: bool | None = None
    """make the user's message of a prompt that is plain text; false leaves it as it is without a word"""
    system: str | None = None
    """system message of conversations that have none"""
    chat_template: str | None = None
    """chatml, llama3, dialogue or a file: the chat template to use instead of the tokenizer's; saved with the model"""
    template: TemplateSettings = {}
    """variables for the chat template, as in enable_thinking=false; saved with the model"""


class PromptSettings(ChatSettings):
    path: str
    """JSON lines, Parquet, or a hub data set with one prompt a row"""
    split: str = "train"
    """which split of a hub data set"""
    column: str = "prompt"
    """the column that holds the prompt (text, or a list of chat messages)"""
    max_tokens: Count = 512
    """longest prompt allowed"""
    too_long: Literal["error", "drop", "truncate"] = "error"
    """what to do with a longer one; truncate drops a chat's oldest turns, and the beginning of a text"""


class RewardSource(Settings):
    """One scorer: exactly one of model, function, url."""

    model: str | None = None
    """folder or hub id of a reward model (sequence classification, one label), with its own tokenizer; or the folder of
    a peft adapter of one, which shares the memory of its base with the policy's or the reference"""
    function: str | None = None
    """FILE.py:NAME of a Python function with the signature of TRL's reward functions, sync or async"""
    url: str | None = None
    """HTTP scorer: POST {"query": [...], "prompts": [...]} -> {"rewards": [...]}"""
    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] | None = None
    """name of its metrics, as in rewards/NAME (default: that of the function, of the folder of the run that made the
    model, or the last part of the address; with a number where another scorer has it)"""
    weight: float = 1.0
    """its weight in the sum of all scorers"""
    noisy: bool = False
    """the same answer may get another score: skips the self-check's repetition"""
    timeout_seconds: Positive | None = None
    """deadline for one batch of a function or url, retries included (default: 60 for a url, none for a function)"""
    combine: Literal["mean", "min", "lower"] = "mean"
    """score of an ensemble of reward models: mean or minimum over its members, or mean - std_coef * their deviation"""
    std_coef: NonNegative = 1.0
    """with combine: lower"""
    ungated: bool = False
    """use a reward model although it failed its gate"""
    chat_template: str | None = None
    """of a reward model that was made elsewhere: chatml, llama3, dialogue or a file, to read chats with"""
    dtype: Dtype = "float32"
    """number format of a reward model's weights; bfloat16 takes half the memory"""

    @model_validator(mode="after")
    def _fits_together(self) -> "RewardSource":
        if sum(kind is not None for kind in (self.model, self.function, self.url)) != 1:
            raise ValueError("give exactly one of model, function, url")
        if self.model is not None and self.timeout_seconds is not None:
            raise ValueError("timeout_seconds: a reward model has no deadline; remove it")
        if self.chat_template is not None and not self.model:
            raise ValueError("chat_template is for a reward model")
        if self.dtype != "float32" and not self.model:
            raise ValueError("dtype is for a reward model")
        return self

    @property
    def label(self) -> str:
        """The name, or what it is by default."""
        if self.name is not None:
            return self.name
        if self.function is not None:
            return clean_name(self.function.rpartition(":")[2]) or "function"
        if self.model is None:
            return clean_name((self.url or "").partition("?")[0].rstrip("/").rpartition("/")[2]) or "url"
        parts = [*PurePath(self.model).parts]
        while len(parts) > 1 and parts[-1] in ("model", "adapter"):  # what every run calls its result
            parts.pop()
        start = -2 if parts and parts[-1].isdecimal() else -1  # members/0
        return clean_name("_".join(parts[start:])) or "model"


def scorer_names(sources: Sequence[RewardSource]) -> list[str]:
    """One name for each scorer, which no other has. Raises ValueError for two names given that clash."""
    taken: list[str] = []
    for name in filter(None, (source.name for source in sources)):
        if (other := clashing(name, taken)) is not None:
            same = "two scorers have the name" if other == name else f"beside a scorer {other}, no other may be called"
            raise ValueError(f"{same} {name}; give each a `name` of its own")
        taken.append(name)
    names = []
    for source in sources:
        if source.name is None:
            taken.append(free_name(source.label, taken))
        names.append(source.name or taken[-1])
    return names


def with_scorer_names(sources: list[RewardSource]) -> list[RewardSource]:
    """The same with every scorer's name written down, so that whoever reads the settings later finds it there."""
    pairs = zip(sources, scorer_names(sources), strict=True)
    return [source.model_copy(update={"name": name}) for source, name in pairs]


Rewards = Annotated[list[RewardSource], AfterValidator(with_scorer_names)]


class OptimSettings(Settings):
    learning_rate: Positive = 1e-5
    """peak learning rate of AdamW"""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """shape after the warm-up; linear and cosine end at zero"""
    warmup_steps: CountOrNone = 0
    """optimizer steps of linear warm-up"""
    weight_decay: NonNegative = 0.0
    """decoupled weight decay"""
    max_grad_norm: Positive = 1.0
    """gradients of each model are clipped to this norm"""
    eps: Positive = 1e-8
    """epsilon of AdamW (torch form: added to the bias-corrected root)"""
    on_fault: Literal["stop", "skip"] = "stop"
    """an update with a loss or gradient that is not finite, or a gradient that jumps: stop before it, or skip it"""
    max_skips: Count = 3
    """more skipped updates in a row stop the run"""
    spike: Annotated[float, Field(gt=1.0)] | None = None
    """a gradient jumps when its norm is this many times the mean of those before it (null = never)"""


class CheckpointSettings(Settings):
    every: CountOrNone = 20
    """steps between checkpoints; 0 = only at the end"""
    keep: CountOrNone = 2
    """how many to keep; 0 = all"""
    keep_final: bool = True
    """keep them when the run has finished: they are most of its size, but without them it cannot take more steps"""


class LogSettings(Settings):
    trackers: list[Literal["tensorboard"]] = []
    """also write metrics to these"""


def as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Runs = Annotated[list[str], BeforeValidator(as_list), Field(min_length=1)]


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


def check_host_names(host: str, names: Sequence[str]) -> None:
    """Raises ValueError for an address that is nobody's name, by which no client can call."""
    if host in ("0.0.0.0", "::") and not names:
        raise ValueError(f"host {host} needs names, those that clients call it by")
