"""Sections of settings that several verbs share. The docstring of a field is its help text."""

import json
from collections.abc import Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from keel.config.base import (
    Count,
    CountOrNone,
    Dtype,
    NonNegative,
    Positive,
    Quantization,
    Settings,
)
from keel.config.judge import ScorerJudge
from keel.naming import clashing_name, clean_name, free_name


class LoraSettings(Settings):
    r: Count = 16
    """Rank of the LoRA adapter; LoRA is off unless one of its settings is given"""
    alpha: Count = 32
    """Scale of the LoRA adapter: its output is multiplied by alpha / r"""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the layers that get a LoRA adapter"""


class ModelSettings(Settings):
    model: str
    """Folder or hub id of the model to train: any transformers causal language model"""
    dtype: Dtype = "float32"
    """Number format for computing. Trained weights, gradients and optimizer moments are float32 in any case"""
    lora: LoraSettings | None = None
    """Train a low-rank adapter instead of all weights (needs `pip install peft`). A separate critic trains an adapter
    too; policy, reference and critic share one base"""
    quantization: Quantization | None = None
    """Quantize the frozen base of the LoRA adapter: nf4 (4 bits a weight) or int8 (needs `pip install bitsandbytes`).
    Embeddings, norms and heads keep their weights"""
    gradient_checkpointing: bool = False
    """Save memory by computing each layer again in the backward pass, for a third more work"""

    @model_validator(mode="after")
    def _check_quantization(self) -> "ModelSettings":
        check_quantization(self.quantization, self.lora)
        return self


def check_quantization(quantization: Quantization | None, lora: LoraSettings | None) -> None:
    """Raise ValueError for a quantized model without an adapter: quantized weights cannot be trained."""
    if quantization is not None and lora is None:
        raise ValueError(f"quantization {quantization} needs lora; set lora.r, or remove quantization")


class ParallelSettings(Settings):
    """Several processes, started by torchrun."""

    shard: Count | None = None
    """Number of processes that share one copy of the weights and the optimizer's moments (default: all; 1: each process
    has its own copy); it must divide the number of processes"""


def _parse_values(value: Any) -> Any:
    """Parse variables from the command line, where values are text: `false` is a bool, `3` a number."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return value
    if not isinstance(value, dict):
        return value
    return {name: _parse_value(entry) for name, entry in value.items()}


def _parse_value(value: Any) -> Any:
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
    dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], bool | int | float | str | None],
    BeforeValidator(_parse_values),
]


class ChatSettings(Settings):
    """How prompts are presented to a chat model."""

    chat: bool | None = None
    """Turn a prompt that is plain text into a user message; false leaves it as it is, without a warning"""
    system: str | None = None
    """System message for conversations that have none"""
    chat_template: str | None = None
    """Chat template to use instead of the tokenizer's: chatml, llama3, dialogue or a file; saved with the model"""
    template: TemplateSettings = {}
    """Variables for the chat template, as in enable_thinking=false; saved with the model"""


class PromptSettings(ChatSettings):
    path: str
    """File of JSON lines or Parquet, or hub data set, with one prompt in each row"""
    split: str = "train"
    """Split of a hub data set"""
    column: str = "prompt"
    """Column that holds the prompt (text, or a list of chat messages)"""
    max_tokens: Count = 512
    """Longest prompt allowed, in tokens"""
    too_long: Literal["error", "drop", "truncate"] = "error"
    """What to do with a prompt over max_tokens: error stops the run, drop leaves the prompt out, truncate drops the
    oldest turns of a chat or the beginning of a text"""


class RewardSource(Settings):
    """A scorer: exactly one of model, function, url, judge."""

    model: str | None = None
    """Folder or hub id of a reward model (sequence classification, one label), used with its tokenizer; or the folder
    of a peft adapter of one, which shares its base with the policy or the reference"""
    function: str | None = None
    """FILE.py:NAME of a Python function with the signature of TRL's reward functions, sync or async"""
    url: str | None = None
    """Address of an HTTP scorer: POST {"query": [...], "prompts": [...]} -> {"rewards": [...]}"""
    judge: ScorerJudge | None = None
    """A language model that scores or compares responses by a rubric"""
    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] | None = None
    """Name in the metrics, as in rewards/NAME (default: that of the function, of the run folder of the model, of the
    judge's model, or the last part of the address; numbered if already in use)"""
    weight: float = 1.0
    """Weight in the sum of all scorers"""
    noisy: bool = False
    """The same response may get different scores; the self-check then does not test that scores repeat"""
    timeout_seconds: Positive | None = None
    """Deadline for one batch of a function or url, retries included (default: 60 for a url, none for a function)"""
    combine: Literal["mean", "min", "lower"] = "mean"
    """Score of an ensemble of reward models: mean or minimum of its members, or lower: mean - std_coef * standard
    deviation"""
    std_coef: NonNegative = 1.0
    """Number of standard deviations to subtract, with combine: lower"""
    ungated: bool = False
    """Use a reward model although it failed its gate"""
    chat_template: str | None = None
    """Chat template for a reward model that was not made by keel: chatml, llama3, dialogue or a file"""
    dtype: Dtype = "float32"
    """Number format of the weights of a reward model; bfloat16 takes half the memory"""

    @model_validator(mode="after")
    def _check_combinations(self) -> "RewardSource":
        if sum(kind is not None for kind in (self.model, self.function, self.url, self.judge)) != 1:
            raise ValueError("set exactly one of model, function, url, judge")
        if self.judge is not None and self.timeout_seconds is not None:
            raise ValueError("timeout_seconds: the deadline of a judge is judge.timeout_seconds; set that")
        if self.model is not None and self.timeout_seconds is not None:
            raise ValueError("timeout_seconds: a reward model has no deadline; remove it")
        if self.chat_template is not None and not self.model:
            raise ValueError("chat_template needs model; remove it for another scorer")
        if self.dtype != "float32" and not self.model:
            raise ValueError("dtype needs model; remove it for another scorer")
        return self

    @property
    def label(self) -> str:
        """Name of the scorer, or the default for it, which another scorer may have too."""
        if self.name is not None:
            return self.name
        if self.judge is not None:
            return self.judge.label
        if self.function is not None:
            return clean_name(self.function.rpartition(":")[2]) or "function"
        if self.model is None:
            return clean_name((self.url or "").partition("?")[0].rstrip("/").rpartition("/")[2]) or "url"
        parts = [*PurePath(self.model).parts]
        while len(parts) > 1 and parts[-1] in ("model", "adapter"):  # every run has these folders
            parts.pop()
        start = -2 if parts and parts[-1].isdecimal() else -1  # of an ensemble: members/0
        return clean_name("_".join(parts[start:])) or "model"


def scorer_names(sources: Sequence[RewardSource]) -> list[str]:
    """Return a unique name for each scorer. Raises ValueError if two explicit names clash."""
    taken: list[str] = []
    for name in filter(None, (source.name for source in sources)):
        if (other := clashing_name(name, taken)) is not None:
            clash = "are equal" if other == name else "clash, because intervals end in _low and _high"
            raise ValueError(f"the scorer names {other} and {name} {clash}; give each scorer a different `name`")
        taken.append(name)
    names = []
    for source in sources:
        if source.name is None:
            taken.append(free_name(source.label, taken))
        names.append(source.name or taken[-1])
    return names


def with_scorer_names(sources: list[RewardSource]) -> list[RewardSource]:
    """Fill in the name of every scorer, so that the saved settings have the names that the metrics use."""
    pairs = zip(sources, scorer_names(sources), strict=True)
    return [source.model_copy(update={"name": name}) for source, name in pairs]


Rewards = Annotated[list[RewardSource], AfterValidator(with_scorer_names)]


class OptimSettings(Settings):
    learning_rate: Positive = 1e-5
    """Peak learning rate of AdamW"""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Shape of the learning rate after the warm-up; linear and cosine end at zero"""
    warmup_steps: CountOrNone = 0
    """Number of optimizer steps of linear warm-up"""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay of AdamW"""
    max_grad_norm: Positive = 1.0
    """Largest norm of the gradient of each model; larger gradients are clipped"""
    eps: Positive = 1e-8
    """Epsilon of AdamW (torch form: added to the bias-corrected root)"""
    on_fault: Literal["stop", "skip"] = "stop"
    """What to do when the loss or gradient of an update is not finite, or its gradient jumps: stop, or skip the
    update"""
    max_skips: Count = 3
    """Largest number of skipped updates in a row; more stop the run"""
    spike: Annotated[float, Field(gt=1.0)] | None = None
    """A gradient jumps when its norm is this many times the mean norm of the last 100 updates (null = never)"""


class CheckpointSettings(Settings):
    every: CountOrNone = 20
    """Steps between checkpoints; 0 = only at the end"""
    keep: CountOrNone = 2
    """Number of checkpoints to keep; 0 = all"""
    keep_final: bool = True
    """Keep the checkpoints of a finished run: they take most of its space, and are needed to train for more steps"""


class LogSettings(Settings):
    trackers: list[Literal["tensorboard"]] = []
    """Trackers that also receive the metrics"""


def as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Runs = Annotated[list[str], BeforeValidator(as_list), Field(min_length=1)]


class DecodingSettings(Settings):
    num_responses: Count = 1
    """Number of responses to each prompt"""
    batch_size: Count = 64
    """Number of responses that are sampled at once"""
    max_response_tokens: Count = 64
    """Longest response, in tokens"""
    temperature: NonNegative = 1.0
    """Sampling temperature; 0 takes the most likely token (greedy decoding)"""
    top_k: CountOrNone = 0
    """Sample only from the k most likely tokens; 0 = all"""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Sample only from the most likely tokens that together have this probability"""
    stop: list[str] = []
    """Texts that end a response, in addition to the end tokens of the model"""
    stop_in_text: bool = True
    """Include an end token that is ordinary text, such as a full stop, in the text of the response"""


class VerifiedSettings(Settings):
    """Tasks whose responses are correct or not, by their score."""

    pass_at: list[Count] = []
    """Numbers k for which to report pass@k, the share of prompts with a correct response among k; also reports avg@n,
    the share of correct responses. Needs as many responses to a prompt"""
    pass_score: float = 1.0
    """Smallest score of a correct response"""


def check_pass_sizes(pass_at: Sequence[int], num_responses: int, setting: str) -> None:
    """Raise ValueError for a pass@k of more responses than there are to a prompt."""
    most = max(pass_at, default=0)
    if most > num_responses:
        raise ValueError(
            f"pass_at: {most} is more than the {num_responses} responses to a prompt; lower it, or raise {setting}"
        )


def check_host_names(host: str, names: Sequence[str]) -> None:
    """Raise ValueError for the wildcard address without names: no client can call a server by that address."""
    if host in ("0.0.0.0", "::") and not names:
        raise ValueError(f"host {host} needs names; list the names or addresses that clients use")
