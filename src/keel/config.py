"""All settings, as frozen data: no torch, nothing here acts. A line under a field is its help text.

`parse` turns a plain mapping (a YAML file merged with the command line) into settings or one clear `ConfigError`.
"""

import difflib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from keel.errors import ConfigError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


# ---- parts that several verbs share -------------------------------------------------------------------------------


class LoraSettings(Settings):
    r: Count = 16
    """rank of the adapter"""
    alpha: Positive = 32.0
    """scale of the adapter: it is multiplied by alpha / r"""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """names of the layers that get an adapter"""


class ModelSettings(Settings):
    model: str
    """a folder or hub id of any transformers causal language model"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """number format of the weights"""
    lora: LoraSettings | None = None
    """train a low-rank adapter instead of all weights (needs `pip install keel-rlhf[peft]`)"""


class PromptSettings(Settings):
    path: str
    """JSON lines, Parquet, or a hub data set with one prompt a row"""
    split: str = "train"
    """which split of a hub data set"""
    column: str = "prompt"
    """the column that holds the prompt (text, or a list of chat messages)"""
    max_tokens: Count = 512
    """longest prompt allowed"""
    too_long: Literal["error", "drop", "truncate"] = "error"
    """what to do with a longer one; truncate keeps its end"""


class RewardSource(Settings):
    """One scorer: exactly one of model, function, url."""

    model: str | None = None
    """folder or hub id of a reward model (sequence classification, one label), with its own tokenizer"""
    function: str | None = None
    """FILE.py:NAME of a Python function with the signature of TRL's reward functions, sync or async"""
    url: str | None = None
    """HTTP scorer: POST {"query": [...], "prompts": [...]} -> {"rewards": [...]}"""
    weight: float = 1.0
    """its weight in the sum of all scorers"""
    noisy: bool = False
    """the same answer may get another score: skips the self-check's repetition"""
    timeout_seconds: Positive = 60.0
    """deadline for one batch of an HTTP scorer, retries included"""

    @model_validator(mode="after")
    def _exactly_one(self) -> "RewardSource":
        if sum(kind is not None for kind in (self.model, self.function, self.url)) != 1:
            raise ValueError("give exactly one of model, function, url")
        return self

    @property
    def name(self) -> str:
        """Short name for metric keys."""
        source = self.function.rpartition(":")[2] if self.function else (self.model or self.url or "")
        return source.rstrip("/").rpartition("/")[2] or source


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


class CheckpointSettings(Settings):
    every: CountOrNone = 20
    """steps between checkpoints; 0 = only at the end"""
    keep: CountOrNone = 2
    """how many to keep; 0 = all"""


class LogSettings(Settings):
    rollouts_per_step: CountOrNone = 4
    """answers written to rollouts.jsonl at every step"""
    trackers: list[Literal["tensorboard"]] = []
    """also write metrics to these"""


# ---- keel train -----------------------------------------------------------------------------------------------------


class CriticSettings(Settings):
    sharing: Literal["separate", "shared"] = "separate"
    """a model of its own, or a value head on the policy's trunk"""
    init: str = "policy"
    """start of a separate critic's trunk: policy, reward (the first reward model, head included) or a folder"""
    warmup_steps: CountOrNone = 0
    """first steps in which only the critic learns"""


class RolloutSettings(Settings):
    batch_size: Count = 64
    """responses per step, all ranks together"""
    group_size: Count | None = None
    """responses per prompt (default: 4 for rloo and grpo, else 1)"""
    max_response_tokens: Count = 64
    """longest response"""
    temperature: Positive = 1.0
    """of sampling and of every log-probability"""
    stop: list[str] = []
    """further tokens that end a response, besides the model's own end tokens"""


class RewardShaping(Settings):
    missing_eos_penalty: NonNegative = 0.0
    """subtracted from the score of a truncated response"""
    clip: Positive | None = None
    """scores are limited to +- this, after normalisation"""
    normalize: Literal["none", "reference", "running"] = "none"
    """shift and scale scores by statistics of the reference's answers (measured once) or of all answers so far"""
    segments: str = "none"
    """none, sentence, or a delimiter: score parts of the answer, each on its last token"""
    on_failure: Literal["stop", "drop"] = "stop"
    """a scorer fails for good: checkpoint and stop, or drop the affected responses and count them"""


class AlgorithmSettings(Settings):
    name: Literal["ppo", "a2c", "reinforce", "rloo", "grpo"] = "ppo"
    """which row of the algorithm table"""
    kl_coef: NonNegative = 0.05
    """weight of the KL to the reference; 0 = no reference is loaded"""
    kl_in: Literal["reward", "loss"] = "reward"
    """where the KL acts"""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """per-token estimate of the KL (default: k1 in the reward, k2 in the loss; others are biased there)"""
    target_kl: Positive | None = None
    """adapt kl_coef towards this objective/kl (nats per response)"""
    kl_horizon: Positive = 10_000.0
    """responses over which the adaptive kl_coef reacts"""
    gamma: Fraction = 1.0
    """discount per token"""
    gae_lambda: Fraction = 0.95
    """GAE: 0 = one-step advantages, 1 = full returns"""
    clip_range_low: Positive = 0.2
    """ppo, grpo: the ratio is clipped below at 1 - this"""
    clip_range_high: Positive = 0.2
    """ppo, grpo: the ratio is clipped above at 1 + this"""
    dual_clip: Annotated[float, Field(gt=1.0)] | None = None
    """bound of the loss for negative advantages, in units of the advantage"""
    value_clip_range: Positive | None = None
    """limit the critic's move per step, in units of the returns"""
    value_coef: Positive = 0.5
    """weight of the value loss"""
    entropy_coef: NonNegative = 0.0
    """weight of the entropy bonus"""
    update_epochs: Count | None = None
    """passes over each batch (default: 4 for ppo, else 1)"""
    minibatch_size: Count | None = None
    """responses per optimizer step, all ranks (default: a quarter of the batch for ppo, else the whole)"""
    microbatch_tokens: Count = 16_384
    """padded tokens per forward pass; never changes the result"""
    max_approx_kl: Positive | None = None
    """end the step's epochs when policy/approx_kl exceeds this"""
    whiten_advantages: bool = True
    """zero mean and unit variance over the batch (not for rloo and grpo, whose groups do it)"""
    whiten_rewards: bool = False
    """unit variance of the token rewards, mean kept"""
    normalize_std: bool = True
    """grpo: divide by the group's standard deviation (false = Dr.GRPO)"""
    truncation: Literal["terminal", "bootstrap"] = "terminal"
    """value after a truncated response: 0, or the critic's"""

    @model_validator(mode="after")
    def _estimator_exists(self) -> "AlgorithmSettings":
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError("kl_estimator k1 in the loss has a gradient of zero on average; use k2 or k3")
        if self.target_kl is not None and self.kl_coef == 0:
            raise ValueError("target_kl adapts kl_coef, which must then be above 0")
        return self


class TrainOptim(OptimSettings):
    critic_learning_rate: Positive | None = None
    """of the critic (default: 10 times learning_rate when separate; a shared trunk has one rate)"""


class EvaluateDuring(Settings):
    every: CountOrNone = 0
    """steps between evaluations; 0 = none"""
    prompts: str | None = None
    """held-out prompts file (its column and length rules are those of `prompts`)"""


ALGORITHM_DEFAULTS: dict[str, dict[str, int]] = {
    "ppo": {"update_epochs": 4, "minibatches": 4, "group_size": 1},
    "a2c": {"update_epochs": 1, "minibatches": 1, "group_size": 1},
    "reinforce": {"update_epochs": 1, "minibatches": 1, "group_size": 1},
    "rloo": {"update_epochs": 1, "minibatches": 1, "group_size": 4},
    "grpo": {"update_epochs": 1, "minibatches": 1, "group_size": 4},
}


class TrainConfig(Settings):
    """Settings of `keel train`: learn a policy from rewards."""

    output: str
    """the run folder"""
    seed: int = 0
    """of every random stream"""
    steps: Count = 100
    """collect-and-update steps"""
    policy: ModelSettings
    critic: CriticSettings = CriticSettings()
    reference: str | None = None
    """folder of the frozen reference (default: the weights that the run starts from)"""
    prompts: PromptSettings
    rollout: RolloutSettings = RolloutSettings()
    rewards: list[RewardSource] = []
    """the scorers, e.g. [{"model": "runs/reward/model"}, {"function": "my.py:f", "weight": 0.5}]"""
    reward: RewardShaping = RewardShaping()
    algorithm: AlgorithmSettings = AlgorithmSettings()
    optim: TrainOptim = TrainOptim()
    checkpoint: CheckpointSettings = CheckpointSettings()
    evaluate: EvaluateDuring = EvaluateDuring()
    log: LogSettings = LogSettings()

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """Write the defaults that depend on the algorithm into the settings, so that the saved file shows them."""
        if not isinstance(data, Mapping):
            return data
        algorithm, rollout = _as_dict(data.get("algorithm")), _as_dict(data.get("rollout"))
        if not isinstance(algorithm, dict) or not isinstance(rollout, dict):
            return data
        row = ALGORITHM_DEFAULTS.get(str(algorithm.get("name") or "ppo"))
        batch_size = rollout.get("batch_size") or RolloutSettings().batch_size
        if row is not None:
            _default(algorithm, "update_epochs", row["update_epochs"])
            _default(rollout, "group_size", row["group_size"])
            if str(batch_size).isdigit():
                _default(algorithm, "minibatch_size", _share(int(batch_size), row["minibatches"]))
        _default(algorithm, "kl_estimator", "k2" if algorithm.get("kl_in") == "loss" else "k1")
        return {**data, "algorithm": algorithm, "rollout": rollout}

    @model_validator(mode="after")
    def _sizes_fit(self) -> "TrainConfig":
        batch_size, group_size = self.rollout.batch_size, self.rollout.group_size or 1
        minibatch_size = self.algorithm.minibatch_size or batch_size
        if batch_size % group_size:
            raise ValueError(f"rollout.batch_size {batch_size} is no multiple of rollout.group_size {group_size}")
        if batch_size % minibatch_size:
            raise ValueError(
                f"rollout.batch_size {batch_size} is no multiple of algorithm.minibatch_size {minibatch_size}"
            )
        if self.algorithm.name in ("rloo", "grpo") and group_size < 2:
            raise ValueError(f"{self.algorithm.name} compares answers to one prompt: rollout.group_size must be >= 2")
        if self.evaluate.every and not self.evaluate.prompts:
            raise ValueError("evaluate.every needs evaluate.prompts, a file of held-out prompts")
        if self.critic.sharing == "shared" and self.critic.init != "policy":
            raise ValueError("critic.init needs critic.sharing: separate")
        return self


# ---- the other verbs --------------------------------------------------------------------------------------------------


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
    """train a low-rank adapter, merged into the weights at the end"""
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


# ---- reading --------------------------------------------------------------------------------------------------------

SettingsT = TypeVar("SettingsT", bound=BaseModel)


def parse(settings: type[SettingsT], data: Mapping[str, Any], where: str = "settings") -> SettingsT:
    """Check a plain mapping against `settings`; raises ConfigError in one line, with the nearest known name."""
    try:
        return settings.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, settings), where=where) from None


def setting_names(settings: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings, e.g. `algorithm.kl_coef`."""
    for name, field in settings.model_fields.items():
        inner = next((part for part in _parts(field.annotation) if issubclass(part, BaseModel)), None)
        if inner is None or name == "rewards":
            yield prefix + name
        else:
            yield from setting_names(inner, f"{prefix}{name}.")


def nearest(name: str, known: list[str]) -> str:
    """A hint such as `did you mean kl_coef?`, or the whole list when nothing is near."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {match[0]}?" if match else f"known: {', '.join(known)}"


def _explain(error: ValidationError, settings: type[BaseModel]) -> str:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    name = ".".join(path)
    if first["type"] == "extra_forbidden":
        owner = _descend(settings, path[:-1])
        return f"unknown setting {name}; {nearest(path[-1], list(owner.model_fields))}"
    if first["type"] == "missing":
        return f"setting {name} is missing"
    message = first["msg"].removeprefix("Value error, ")
    given = first["input"]
    shown = f", got {given!r}" if path and not isinstance(given, dict) else ""
    return f"{name}: {message}{shown}" if name else message


def _descend(settings: type[BaseModel], path: list[str]) -> type[BaseModel]:
    for part in path:
        field = settings.model_fields.get(part)
        if field is not None:
            settings = next((t for t in _parts(field.annotation) if issubclass(t, BaseModel)), settings)
    return settings


def _parts(annotation: Any) -> Iterator[type]:
    """The plain classes inside an annotation such as `list[X] | None`."""
    if isinstance(annotation, type):
        yield annotation
    for inner in get_args(annotation):
        yield from _parts(inner)


def _as_dict(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump()
    return dict(value or {}) if isinstance(value, Mapping | None) else value


def _share(whole: int, parts: int) -> int:
    """The largest divisor of `whole` that is at most whole / parts."""
    return next(size for size in range(max(1, whole // parts), 0, -1) if whole % size == 0)


def _default(settings: dict[str, Any], key: str, value: Any) -> None:
    if settings.get(key) is None:
        settings[key] = value
