"""Settings of `keel evaluate`."""

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field, field_validator, model_validator

from keel.config.base import Count, CountOrNone, Dtype, Settings
from keel.config.rollout import EngineName, VllmServerSettings, check_engine_settings
from keel.config.sections import DecodingSettings, PromptSettings, Rewards, VerifiedSettings, as_list, check_pass_sizes


class HarnessSettings(Settings):
    """How lm-evaluation-harness runs `tasks`."""

    shots: CountOrNone | None = None
    """Number of solved examples before each question (default: that of the task)"""
    limit: Count | None = None
    """Number of questions of each task (default: all)"""
    chat: bool = False
    """Ask the questions with the model's chat template"""
    folder: str | None = None
    """Folder with more task definitions of the harness"""
    batch_size: Count = 8
    """Number of questions at once"""


class EvaluateConfig(VerifiedSettings):
    """Settings of `keel evaluate`: evaluate policies on held-out prompts, separately or against another policy."""

    main_settings: ClassVar[tuple[str, ...]] = (
        "policy",
        "against",
        "checkpoints",
        "prompts.path",
        "rewards",
        "judge",
        "slices",
        "gate",
        "output",
        "pairs",
        "judgements",
        "sampling.num_responses",
        "sampling.max_response_tokens",
        "sampling.temperature",
    )

    policy: Annotated[list[str], BeforeValidator(as_list), Field(min_length=1)] = []
    """Folder or hub id of the policy to evaluate, or the address of an OpenAI-compatible endpoint, http://HOST/v1#MODEL;
    repeat the flag to compare several in one table"""
    checkpoints: str | None = None
    """Run folder of `keel train`: evaluate its initial model, checkpoints and result instead of `policy`. Scorers,
    reference, length and temperature default to those of the run"""
    against: str | None = None
    """Another policy to compare with, a folder or an address: adds its metrics and the win rate against it"""
    reference: str | None = None
    """Folder of the model that the KL is measured to (default: `against`)"""
    tokenizer: str | None = None
    """Folder or hub id of a model whose tokenizer reads the prompts for an endpoint (default: that of the
    first policy that is a folder)"""
    dtype: Dtype = "float32"
    """Number format of the weights of policies and reference"""
    prompts: PromptSettings | None = None
    """Held-out prompts; required unless `tasks` is set"""
    rewards: Rewards = []
    """Scorers, as a JSON list; the score is their weighted sum"""
    judge: str | None = None
    """Name of the scorer that decides who wins (default: the weighted sum of all scorers)"""
    tasks: list[str] = []
    """Tasks of lm-evaluation-harness, as in hellaswag,arc_easy (needs `pip install 'lm_eval[hf]'`)"""
    harness: HarnessSettings = HarnessSettings()
    slices: list[str] = []
    """Columns of the prompts; metrics are also computed for each of their values"""
    best_of: CountOrNone = 0
    """Measure the score of the best of 1, 2, ... up to this many responses to a prompt; at most sampling.num_responses,
    0 = none"""
    pairs: str | None = None
    """Write a pair of responses to each prompt to this .jsonl file, to be compared blindly with `keel rank`"""
    judgements: str | None = None
    """File that `keel rank` exported for the `pairs`: adds the win rate according to people"""
    gate: str | None = None
    """Thresholds that the policy must pass, as in "win_rate>=0.6, high(kl)<=20, slice[refund].score>=0", or a file of
    them"""
    output: str | None = None
    """Write metrics and responses to this JSON file, and the outcome of the gate beside it"""
    seed: int = 0
    """Random seed of sampling and of the bootstrap"""
    sampling: DecodingSettings = DecodingSettings()
    engine: EngineName = "keel"
    """What samples the responses: keel's sampler, or vLLM in a separate process"""
    vllm: VllmServerSettings = VllmServerSettings()

    @property
    def prompt_settings(self) -> PromptSettings:
        """The settings of the prompts, where there are any."""
        assert self.prompts is not None
        return self.prompts

    @field_validator("policy")
    @classmethod
    def _refuse_duplicates(cls, policies: list[str]) -> list[str]:
        if len({Path(policy) for policy in policies}) < len(policies):
            raise ValueError("the same policy is in the list twice")
        return policies

    @model_validator(mode="after")
    def _check_combinations(self) -> "EvaluateConfig":
        check_engine_settings(self.engine, self.vllm)
        if self.prompts is None and not self.tasks:
            raise ValueError("give prompts.path, or tasks")
        if self.tasks and self.checkpoints is not None:
            raise ValueError("tasks: only with policy, not with checkpoints")
        if bool(self.policy) == (self.checkpoints is not None):
            raise ValueError("give either policy or checkpoints")
        for name in ("gate", "pairs"):
            if getattr(self, name) is not None and len(self.policy) != 1:
                raise ValueError(f"{name}: only with one policy")
        if self.pairs is not None and self.against is None:
            raise ValueError("pairs: needs `against`, whose responses are paired with those of the policy")
        if self.judgements is not None and self.pairs is None:
            raise ValueError("judgements: set `pairs` too, the file that the people compared")
        check_pass_sizes(self.pass_at, self.sampling.num_responses, "sampling.num_responses")
        if self.best_of > self.sampling.num_responses:
            raise ValueError(
                f"best_of: {self.best_of} is more than the {self.sampling.num_responses} responses to a prompt; "
                "lower it, or raise sampling.num_responses"
            )
        return self
