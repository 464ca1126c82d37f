"""Settings of `keel train`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from keel.algorithms import ALGORITHM_TRAITS, AlgorithmTraits
from keel.config.base import Count, CountOrNone, Fraction, NonNegative, Positive, Settings
from keel.config.rollout import RolloutSettings
from keel.config.sections import (
    CheckpointSettings,
    LogSettings,
    ModelSettings,
    OptimSettings,
    ParallelSettings,
    Rewards,
    VerifiedSettings,
    check_pass_sizes,
)
from keel.config.training_prompts import TrainPrompts


class CriticSettings(Settings):
    sharing: Literal["separate", "shared"] = "separate"
    """separate: the critic is a second model; shared: a value head on the policy's trunk"""
    init: str = "policy"
    """Initial trunk of a separate critic: policy, reward (the first reward model, head included) or a folder"""
    warmup_steps: CountOrNone = 0
    """Number of initial steps in which only the critic learns"""


class RewardShaping(Settings):
    missing_eos_penalty: NonNegative = 0.0
    """Penalty subtracted from the score of a truncated response"""
    overlong_tokens: CountOrNone = 0
    """Number of tokens before the length limit in which a penalty for long responses rises from 0 (DAPO); 0 = none"""
    overlong_penalty: Positive = 1.0
    """Penalty for a response of the full length, if overlong_tokens is set"""
    clip: Positive | None = None
    """Limit scores to +- this, after normalization"""
    normalize: Literal["none", "reference", "running"] = "none"
    """Shift and scale scores by the statistics of the reference's responses (measured once), or of all responses so far
    (running)"""
    segments: str = "none"
    """Score parts of the response, each on its last token: none, sentence, or a delimiter"""
    on_failure: Literal["stop", "drop"] = "stop"
    """What to do when a scorer fails after all retries: save a checkpoint and stop, or drop the affected responses and
    count them"""


MOST_RANKED = 26
"""Largest number of responses that a judge ranks at once: each has a letter."""

_GROUPED = [name for name, traits in ALGORITHM_TRAITS.items() if traits.compares_groups]
_CLIPPED = [name for name, traits in ALGORITHM_TRAITS.items() if traits.clips_ratio]

if TYPE_CHECKING:
    AlgorithmName = str
else:
    AlgorithmName = Literal[tuple(ALGORITHM_TRAITS)]  # a Literal, so that help and errors list the names


class AlgorithmSettings(Settings):
    name: AlgorithmName = "ppo"
    """Reinforcement learning algorithm"""
    kl_coef: NonNegative = 0.05
    """Weight of the KL to the reference; with 0 the KL is still measured if there is a reward model"""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where to put the KL: in the reward, or as a term of the loss"""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """Estimate of the KL for each token: k1 in the reward, k2 (the default) or k3 in the loss; other combinations are
    refused"""
    target_kl: Positive | None = None
    """Adapt kl_coef to reach this objective/kl (nats per response)"""
    kl_horizon: Positive = 10_000.0
    """Number of responses over which the adaptive kl_coef reacts"""
    gamma: Fraction = 1.0
    """Discount factor per token"""
    gae_lambda: Fraction = 0.95
    """Lambda of GAE: 0 = one-step advantages, 1 = full returns"""
    clip_range_low: Positive = 0.2
    """Clip the probability ratio below at 1 - this (algorithms with a ratio: ppo, grpo, reinforce++)"""
    clip_range_high: Positive = 0.2
    """Clip the probability ratio above at 1 + this (algorithms with a ratio)"""
    dual_clip: Annotated[float, Field(gt=1.0)] | None = None
    """Upper bound of the loss for negative advantages, in units of the advantage (algorithms with a ratio)"""
    clip_target: Literal["loss", "weight"] = "loss"
    """What the clip range limits: loss, as in PPO, removes the gradient of tokens outside the range; weight, as in
    CISPO, limits the importance weight of each token and keeps its gradient (algorithms with a ratio)"""
    ratio_level: Literal["token", "sequence"] = "token"
    """Probability ratio of each token, or one for each response, as in GSPO: the geometric mean of its tokens'
    (algorithms with a ratio)"""
    loss_aggregation: Literal["token", "sequence", "constant"] = "token"
    """Reduction of the policy loss: token = mean over all tokens; sequence = mean of each response, then over the
    responses, as in GRPO and GSPO; constant = sum over responses times rollout.max_response_tokens, as in Dr.GRPO"""
    value_clip_range: Positive | None = None
    """Largest change of a value in one step, in standard deviations of the returns (the largest so far)"""
    value_coef: Positive = 0.5
    """Weight of the value loss"""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus"""
    update_epochs: Count | None = None
    """Passes over each batch (default: 4 for ppo, else 1)"""
    minibatch_size: Count | None = None
    """Responses in each optimizer step, of all processes together (default: a quarter of the batch for algorithms
    with a ratio, else the full batch)"""
    microbatch_tokens: Count = 16_384
    """Padded tokens in each forward pass; lower it to save memory, it never changes the result"""
    max_approx_kl: Positive | None = None
    """End the epochs of a step when policy/approx_kl exceeds this"""
    max_kl: Positive | None = None
    """Stop the run before an update whose responses have a mean KL to the reference above this (nats per response)"""
    min_entropy: Positive | None = None
    """Stop the run before an update whose responses have a mean entropy below this (nats per token)"""
    whiten_advantages: bool = True
    """Scale advantages to zero mean and unit variance over the batch (rloo and grpo scale within groups instead)"""
    normalize_std: bool = True
    """Divide advantages by the standard deviation of their group (grpo); false: as Dr.GRPO, which also has
    loss_aggregation: constant"""
    truncation: Literal["terminal", "bootstrap"] = "terminal"
    """Value after a truncated response: terminal = 0, bootstrap = the critic's value"""

    @property
    def traits(self) -> AlgorithmTraits:
        return ALGORITHM_TRAITS[self.name]

    @model_validator(mode="after")
    def _check_combinations(self) -> "AlgorithmSettings":
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError("kl_estimator k1 in the loss has a gradient of zero on average; use k2 or k3")
        if self.kl_in == "reward" and self.kl_estimator in ("k2", "k3"):
            raise ValueError(
                f"kl_estimator {self.kl_estimator} in the reward has a wrong gradient, which can be worse than no "
                "training; use k1, or kl_in: loss"
            )
        if (self.update_epochs or 1) > 1 and not self.traits.clips_ratio:
            raise ValueError(
                f"update_epochs {self.update_epochs}: {self.name} has no ratio to the policy that sampled, so its "
                f"gradient is right for one pass only; use {' or '.join(_CLIPPED)}, or update_epochs 1"
            )
        if not self.traits.clips_ratio and (self.ratio_level, self.clip_target) != ("token", "loss"):
            setting = "ratio_level: sequence" if self.ratio_level == "sequence" else "clip_target: weight"
            raise ValueError(
                f"{setting} needs a loss with a probability ratio, which {self.name} lacks; use {' or '.join(_CLIPPED)}"
            )
        if self.clip_target == "weight" and self.dual_clip is not None:
            raise ValueError(
                "dual_clip bounds the clipped loss, and clip_target: weight has none; remove one of the two"
            )
        if self.target_kl is not None and self.kl_coef == 0:
            raise ValueError("target_kl adapts kl_coef; set kl_coef above 0")
        return self


class TrainOptim(OptimSettings):
    critic_learning_rate: Positive | None = None
    """Peak learning rate of the critic or value head (default: 3 times learning_rate)"""


class TrainCheckpoint(CheckpointSettings):
    models: Literal["every", "last"] = "every"
    """Which checkpoints also have the policy as a model folder, for `keel evaluate --checkpoints`: every one, or only
    that of the last step, which saves space and time for large models"""


class RolloutLogSettings(LogSettings):
    rollouts_per_step: CountOrNone = 4
    """Number of responses to write to rollouts.jsonl in each step"""


class EvaluateDuring(VerifiedSettings):
    every: CountOrNone = 0
    """Steps between evaluations on held-out prompts; 0 = none"""
    prompts: str | None = None
    """File of held-out prompts; column and length limit are those of `prompts`"""
    num_responses: Count = 1
    """Number of responses to each held-out prompt"""

    @model_validator(mode="after")
    def _check_pass_sizes(self) -> "EvaluateDuring":
        check_pass_sizes(self.pass_at, self.num_responses, "evaluate.num_responses")
        return self


class TrainConfig(Settings):
    """Settings of `keel train`: train a policy on rewards."""

    main_settings: ClassVar[tuple[str, ...]] = (
        "output",
        "policy.model",
        "policy.lora.r",
        "prompts.path",
        "rewards",
        "algorithm.name",
        "algorithm.kl_coef",
        "steps",
        "rollout.batch_size",
        "rollout.max_response_tokens",
        "optim.learning_rate",
        "evaluate.every",
        "evaluate.prompts",
        "seed",
    )

    output: str
    """Run folder"""
    seed: int = 0
    """Random seed"""
    steps: Count = 100
    """Number of steps; each samples and scores one batch of responses, and learns from it"""
    policy: ModelSettings
    critic: CriticSettings = CriticSettings()
    reference: str | None = None
    """Folder of the frozen reference model (default: the initial policy)"""
    prompts: TrainPrompts
    rollout: RolloutSettings = RolloutSettings()
    rewards: Rewards = []
    """Scorers, as a JSON list, e.g. [{"model": "runs/reward/model"}, {"function": "my.py:f", "weight": 0.5}]"""
    reward: RewardShaping = RewardShaping()
    algorithm: AlgorithmSettings = AlgorithmSettings()
    optim: TrainOptim = TrainOptim()
    parallel: ParallelSettings = ParallelSettings()
    checkpoint: TrainCheckpoint = TrainCheckpoint()
    evaluate: EvaluateDuring = EvaluateDuring()
    log: RolloutLogSettings = RolloutLogSettings()
    doctor: Literal["quiet", "tell", "stop"] = "tell"
    """What `keel doctor` does during the run: tell prints critical findings, and warnings that do not follow from
    another finding; stop also ends the run at a critical finding, with a checkpoint; quiet does nothing"""

    @property
    def measures_kl(self) -> bool:
        """Whether the run measures the KL, and so needs a reference.

        With a reward model, the KL is measured even if kl_coef is 0: the scores are trustworthy only for responses like
        those of the initial policy.
        """
        learned_from_model = any(source.model and source.weight for source in self.rewards)
        return self.algorithm.kl_coef > 0 or self.reference is not None or learned_from_model

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the full run."""
        minibatches = self.rollout.batch_size // (self.algorithm.minibatch_size or self.rollout.batch_size)
        return self.steps * (self.algorithm.update_epochs or 1) * minibatches

    @model_validator(mode="before")
    @classmethod
    def _fill_in_defaults(cls, data: Any) -> Any:
        """Fill in the defaults that depend on the algorithm, so that the saved settings contain them."""
        if not isinstance(data, Mapping):
            return data
        algorithm, rollout = _as_dict(data.get("algorithm")), _as_dict(data.get("rollout"))
        if not isinstance(algorithm, dict) or not isinstance(rollout, dict):
            return data
        traits = ALGORITHM_TRAITS.get(str(algorithm.get("name") or "ppo"))
        batch_size = rollout.get("batch_size") or RolloutSettings().batch_size
        if traits is not None:
            _set_default(algorithm, "update_epochs", traits.update_epochs)
            _set_default(rollout, "group_size", traits.group_size)
            if str(batch_size).isdigit():  # values are not validated yet; the field reports an invalid one
                _set_default(algorithm, "minibatch_size", _minibatch_size(int(batch_size), traits.minibatches))
        _set_default(algorithm, "kl_estimator", "k2" if algorithm.get("kl_in") == "loss" else "k1")
        return {**data, "algorithm": algorithm, "rollout": rollout}

    def _check_judges(self, group_size: int) -> None:
        comparing = [source for source in self.rewards if source.judge is not None and source.judge.mode != "score"]
        if not comparing:
            return
        if not 2 <= group_size <= MOST_RANKED:
            raise ValueError(
                f"rewards: a judge that compares needs 2 to {MOST_RANKED} responses to a prompt; set "
                "rollout.group_size, or judge.mode: score"
            )
        if self.evaluate.every and len(comparing) == len(self.rewards):
            raise ValueError(
                "evaluate.every: a judge that compares has no score for the one response to a held-out prompt; add a "
                "scorer, which may have weight 0"
            )

    @model_validator(mode="after")
    def _check_sizes(self) -> "TrainConfig":
        batch_size, group_size = self.rollout.batch_size, self.rollout.group_size or 1
        minibatch_size = self.algorithm.minibatch_size or batch_size
        if self.reward.overlong_tokens > self.rollout.max_response_tokens:
            raise ValueError(
                f"reward.overlong_tokens {self.reward.overlong_tokens} is above rollout.max_response_tokens "
                f"{self.rollout.max_response_tokens}; lower it"
            )
        if batch_size % group_size:
            raise ValueError(f"rollout.batch_size {batch_size} is not a multiple of rollout.group_size {group_size}")
        if batch_size % minibatch_size:
            raise ValueError(
                f"rollout.batch_size {batch_size} is not a multiple of algorithm.minibatch_size {minibatch_size}"
            )
        if self.algorithm.traits.compares_groups and group_size < 2:
            raise ValueError(
                f"{self.algorithm.name} compares responses to one prompt: set rollout.group_size to 2 or more"
            )
        if self.rollout.resample_rounds and not self.algorithm.traits.compares_groups:
            raise ValueError(
                f"rollout.resample_rounds needs an algorithm that compares groups, and {self.algorithm.name} does not; "
                f"use {' or '.join(_GROUPED)}, or remove it"
            )
        if self.critic.warmup_steps >= self.steps and self.algorithm.traits.needs_critic:
            raise ValueError(
                f"critic.warmup_steps {self.critic.warmup_steps} of {self.steps} steps leaves no step for the policy; "
                "lower it"
            )
        self._check_judges(group_size)
        if self.evaluate.every and not self.evaluate.prompts:
            raise ValueError("evaluate.every needs evaluate.prompts, a file of held-out prompts")
        if self.critic.sharing == "shared" and self.critic.init != "policy":
            raise ValueError("critic.init needs critic.sharing: separate; remove one of the two")
        return self


def _as_dict(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump()
    return dict(value or {}) if isinstance(value, Mapping | None) else value


def _minibatch_size(batch_size: int, minibatches: int) -> int:
    """Return the largest divisor of the batch size that is at most batch_size / minibatches."""
    return next(size for size in range(max(1, batch_size // minibatches), 0, -1) if batch_size % size == 0)


def _set_default(settings: dict[str, Any], key: str, value: Any) -> None:
    if settings.get(key) is None:
        settings[key] = value
