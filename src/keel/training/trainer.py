"""PolicyTrainer: sample responses, score them, compute the targets, update the weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keel.config import TrainConfig, parse
from keel.core.diagnostics import approx_kl
from keel.core.kl import RESOLUTION, updated_kl_coef
from keel.data.batches import Rollouts, ScoredRollouts, TrainingBatch, select_rows
from keel.data.prompts import Prompt
from keel.errors import ConfigError, RewardError
from keel.failpoints import failpoint
from keel.learn.gather import gather_batch, gather_rows
from keel.learn.guard import require_finite
from keel.learn.shaping import ScoreStatistics, kept_scores
from keel.learn.targets import analyze_all, build_targets
from keel.models.actor_critic import ValueUnits
from keel.models.heads import compute_dtype
from keel.models.loading import save_policy
from keel.models.sharding import gather_model
from keel.run.rollout_log import rollout_rows
from keel.training.collapse import check_alive, check_finite
from keel.training.engine_check import AgreementWatch
from keel.training.python_prompts import read_given_prompts, with_place
from keel.training.resampling import SampleRound, resample_groups
from keel.training.self_check import require_weight_change, self_check, weight_fingerprint
from keel.training.setup import TrainingSetup, build_training_setup
from keel.training.state import RunState, StepRecord
from keel.training.step_metrics import speed_metrics, step_metrics
from keel.world import World, raise_together

ROWS_READ_AGAIN = 8
"""Most responses that the updated policy reads again, for `policy/step_kl` and the ratios in the log."""
SHARE_READ_AGAIN = 1 / 8
"""Share of a batch of fewer than 64 responses that it reads again, but at least four."""
CLOSE = 0.02
"""Mean difference of log-probs in 16 bits up to which the sampler's are those of the old policy. The ratio of PPO then
starts within about 2% of 1, a tenth of the clip range, and corrects for the difference as an importance weight does."""
REFERENCE_BATCHES = 4
"""Batches of responses that the score statistics of `reward.normalize: reference` are measured on."""


@dataclass(frozen=True)
class StepTargets:
    """The targets of one update, and the score statistics that the run takes over after it."""

    scored: ScoredRollouts
    token_scores: Tensor  # [B, T], shaped
    batch: TrainingBatch
    value_units: ValueUnits
    step_scale: float
    statistics: ScoreStatistics


class PolicyTrainer:
    """Policy, critic, reference and scorers of a run with their state, for `keel train` and for custom loops.

    A step calls `sample`, `score`, `resample`, `compute_targets` and `update_weights`; only the last one changes the
    state.
    `update` combines the last two, with scores that the caller computes:

        trainer = PolicyTrainer.from_config(config)
        rollouts = trainer.sample(prompts)
        metrics = trainer.update(rollouts, scores)
        trainer.save("runs/mine/policy")
    """

    def __init__(self, setup: TrainingSetup) -> None:
        self.setup = setup
        self.state = RunState(step=0, kl_coef=setup.config.algorithm.kl_coef)
        self._engine_watch = AgreementWatch(setup.config) if setup.engine.is_external else None

    @classmethod
    def from_config(
        cls,
        config: TrainConfig | Mapping[str, Any],
        scorers: Sequence[Callable[..., Any]] = (),
        prompts: Any = None,
    ) -> "PolicyTrainer":
        """Load models, prompts and scorers, and run the self-check.

        Args:
            config: the settings of `keel train`. `rewards` may be empty if the scores are passed to `update`, and
                `prompts` if the prompts are passed to `sample`.
            scorers: Python reward functions in addition to `rewards`.
            prompts: replace the file of `config.prompts`: texts, chats or rows with columns.

        Raises ConfigError, DataError or RewardError.
        """
        if not isinstance(config, TrainConfig):
            config = parse(TrainConfig, config if prompts is None else with_place(config))
        world = World.from_environment(config.parallel.shard)
        trainer = cls(build_training_setup(config, scorers, prompts, world, scores_required=False))
        trainer.check()
        if trainer.setup.config.reward.normalize == "reference" and trainer.setup.scorers:
            trainer.measure_reference()
        return trainer

    def check(self) -> dict[str, float]:
        """Run the self-check and return its measurements. Raises ConfigError or RewardError."""
        measured = self_check(self.setup)
        self.state.trust_sampler = trusts_sampler(self.setup, measured)
        return measured

    def measure_reference(self) -> None:
        """Measure the score statistics of the untrained policy, for `reward.normalize: reference`."""
        statistics = ScoreStatistics()
        for batch in range(1, REFERENCE_BATCHES + 1):
            rollouts = self.setup.respond(batch, purpose="reference")
            scored = raise_together(self.setup.world, partial(self.setup.score, rollouts))
            statistics = statistics.plus(kept_scores(scored), self.setup.world)
        self.state.statistics = statistics

    def sample(self, prompts: Any = None) -> Rollouts:
        """Sample `rollout.group_size` responses to each prompt of the next step.

        Args:
            prompts: replace the prompts of the settings: texts, chats or rows with columns, as in `keel.train`.
        """
        setup, repeated = self.setup, self.step_prompts()
        if prompts is not None:
            loaded = read_given_prompts(setup.config.prompts, setup.tokenizer, prompts)
            repeated = [prompt for prompt in loaded for _ in range(setup.config.rollout.group_size or 1)]
        with self.state.timed("sample"):
            failpoint("step.sample")
            return setup.respond(self.state.step + 1, prompts=repeated)

    def step_prompts(self) -> list[Prompt]:
        """Return the prompts of the next step, of all processes, each `rollout.group_size` times."""
        return self.setup.step_prompts(self.state.step + 1, self.state.extra_prompts)

    def score(self, rollouts: Rollouts) -> ScoredRollouts:
        """Score responses with the run's scorers. Raises RewardError on every process if one scorer fails."""
        with self.state.timed("score"):
            failpoint("step.score")
            return raise_together(self.setup.world, partial(self.setup.score, rollouts, self.state.step))

    def resample(self, scored: ScoredRollouts, sample: SampleRound | None = None) -> ScoredRollouts:
        """Replace the groups of equal scores by responses to new prompts, if `rollout.resample_rounds` is set.

        Args:
            sample: samples the responses of a round, in place of the run's engine.

        Raises RewardError on every process if one scorer fails.
        """
        setup, state = self.setup, self.state
        if not setup.config.rollout.resample_rounds:
            return scored
        step, sizes = state.step + 1, (setup.config.rollout.batch_size, setup.config.rollout.group_size or 1)
        next_prompt = step * sizes[0] // sizes[1] + state.extra_prompts
        with state.timed("resample"):
            return resample_groups(
                setup,
                scored,
                step,
                next_prompt,
                sample or (lambda _, prompts, draws: setup.sample(prompts, draws)),
                lambda rollouts: raise_together(setup.world, partial(setup.score, rollouts, state.step)),
            )

    def compute_targets(self, scored: ScoredRollouts) -> StepTargets:
        """Compute the rewards, advantages and returns of each token.

        Raises ConfigError for a batch whose groups of equal scores should have been replaced first.
        """
        setup, state = self.setup, self.state
        if setup.config.rollout.resample_rounds and scored.resampling is None:
            raise ConfigError(
                "groups of equal scores are still in the batch",
                where="rollout.resample_rounds",
                fix="call `resample` between `score` and `compute_targets`, or set it to 0",
            )
        statistics = state.statistics
        if setup.config.reward.normalize == "running":
            statistics = statistics.plus(kept_scores(scored), setup.world)
        with state.timed("targets"):
            failpoint("step.targets")
            token_scores = setup.shaping.token_scores(scored, statistics)
            targets = build_targets(
                scored,
                token_scores,
                setup.actor_critic,
                setup.reference,
                setup.algorithm,
                setup.targets,
                state.kl_coef,
                setup.world,
                state.trust_sampler,
            )
            if self._engine_watch is not None:
                self._engine_watch.check(scored.rollouts, targets.batch)
        return StepTargets(scored, token_scores, targets.batch, targets.value_units, targets.step_scale, statistics)

    def update_weights(self, targets: StepTargets) -> StepRecord:
        """Update policy and critic, then the state. Return the step's metrics and some of its responses.

        Raises Diverged before an update on numbers that are not finite or on a collapsed policy, ConfigError after
        the last step.
        """
        setup, state, batch = self.setup, self.state, targets.batch
        config, step = setup.config, state.step + 1
        if step > config.steps:  # the learning rate schedule ends here
            raise ConfigError(f"all {config.steps} steps are done", where="steps", fix="raise steps")
        check_finite(batch, setup.world)
        check_alive(batch, config.algorithm, setup.world)
        initial = weight_fingerprint(setup) if step == 1 else None
        setup.actor_critic.value_units = targets.value_units
        with state.timed("update"):
            failpoint("step.update")
            step_scale = 0.0 if step <= config.critic.warmup_steps else targets.step_scale
            every_row = gather_batch(batch, setup.world)
            learned = setup.updater.update(every_row, step, state.kl_coef, config.seed, step_scale)
        if initial is not None and bool(every_row.advantages.any()) and learned["update/skipped"] < 1:
            require_weight_change(initial, weight_fingerprint(setup))
        metrics = step_metrics(setup, targets.scored, targets.token_scores, batch, state.kl_coef)
        new_logprobs, moved = self._read_again(targets, every_row)
        first_approx_kl = learned.pop("policy/first_approx_kl")  # NaN where the first optimizer step was skipped
        metrics["sampler/approx_kl"] += first_approx_kl if isfinite(first_approx_kl) else 0.0
        state.step, state.statistics = step, targets.statistics
        state.extra_prompts += targets.scored.resampling.num_groups if targets.scored.resampling else 0
        num_responses = batch.size * setup.world.size
        if config.algorithm.target_kl is not None:
            state.kl_coef = updated_kl_coef(
                state.kl_coef,
                metrics["objective/kl"],
                config.algorithm.target_kl,
                config.algorithm.kl_horizon,
                num_responses,
            )
        num_tokens = float(targets.scored.rollouts.lengths.sum()) * setup.world.size
        metrics |= learned | moved | {"policy/step_scale": step_scale}
        metrics |= speed_metrics(state.seconds, step, num_responses, num_tokens)
        return metrics, self._rollout_rows(targets, new_logprobs)

    def update(self, rollouts: Rollouts, scores: Sequence[float] | Tensor) -> dict[str, float]:
        """Update the weights from responses and their scores. Return the step's metrics.

        Args:
            rollouts: B responses from `sample`.
            scores: [B], one finite number for each response.

        Raises RewardError for scores of another shape or not finite, Diverged as `update_weights` does.
        """
        return self.update_weights(self.compute_targets(with_scores(rollouts, scores)))[0]

    def save(self, folder: str | Path) -> None:
        """Save the policy as a transformers model folder. A LoRA adapter is merged into it and also saved beside it.

        Raises Diverged for weights that are not finite, CheckpointError if the saved model differs from this one.
        """
        require_finite(self.setup.actor_critic.named_parameters(), self.state.step)
        policy = gather_model(self.setup.actor_critic.policy, self.setup.world)
        if policy is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_policy(policy, self.setup.tokenizer, Path(folder))
        self.setup.world.barrier()

    def close(self) -> None:
        """End the engine that samples, if it is another program. It also ends with this process."""
        self.setup.engine.close()

    def _read_again(self, targets: StepTargets, batch: TrainingBatch) -> tuple[Tensor, dict[str, float]]:
        """Compute the log-probs [N, T] of the first few responses under the updated policy, and `policy/step_kl`.

        `policy/approx_kl` does not replace it: it is a mean over the epochs, and does not see the last optimizer step.

        Args:
            batch: the responses of all ranks.
        """
        setup = self.setup
        sampled = gather_rows(targets.scored.rollouts.response_mask, setup.world)  # with the dropped responses
        count = min(ROWS_READ_AGAIN, batch.size, max(4, int(SHARE_READ_AGAIN * batch.size)))
        few = select_rows(replace(batch, response_mask=sampled), range(count))
        rows, width = few.response_mask.shape
        temperature, at_once = setup.targets.temperature, setup.targets.microbatch_tokens
        new_logprobs = analyze_all(setup.actor_critic, few, temperature, at_once, with_values=False).logprobs
        moved = approx_kl(new_logprobs, batch.logprobs[:rows, :width])[batch.response_mask[:rows, :width]]
        return new_logprobs, {"policy/step_kl": float(moved.double().mean())}

    def _rollout_rows(self, targets: StepTargets, new_logprobs: Tensor) -> list[dict[str, Any]]:
        """Return the first responses of the step for the log; on several ranks each contributes those of its share."""
        world, count = self.setup.world, self.setup.config.log.rollouts_per_step
        first = world.share(targets.batch.size * world.size).start
        local = max(0, min(targets.batch.size, count - first))
        rows = rollout_rows(targets.scored, targets.batch, local, self.setup.tokenizer, new_logprobs[first:])
        gathered = [row for share in world.gather_values(list(rows)) for row in share]
        return [{**row, "row": number, "rows": len(gathered)} for number, row in enumerate(gathered)]


def trusts_sampler(setup: TrainingSetup, measured: Mapping[str, float]) -> bool:
    """Return whether the sampler's log-probs and values replace the trainer's, by the self-check.

    All processes agree on it. The log-probs of another program never do.
    """
    is_narrow = compute_dtype(setup.actor_critic.policy).itemsize < 4
    has_ratio = setup.config.algorithm.traits.clips_ratio  # without one, only `rollout.correction_cap` corrects
    is_close = measured["check/logprob_gap"] <= RESOLUTION or (
        is_narrow and has_ratio and measured["check/logprob_gap_mean"] <= CLOSE
    )
    return not setup.engine.is_external and not setup.world.any(not is_close)


def with_scores(rollouts: Rollouts, scores: Sequence[float] | Tensor) -> ScoredRollouts:
    """Attach scores [B] to responses. Raises RewardError for another shape or a score that is not finite."""
    device, count = rollouts.response_mask.device, len(rollouts.texts)
    values = torch.as_tensor(scores, dtype=torch.float32).to(device)
    if values.shape != (count,):
        shape = tuple(values.shape)
        raise RewardError(
            f"expected {count} numbers, got shape {shape}", where="scores", fix="pass one number for each response"
        )
    if not bool(values.isfinite().all()):
        row = int((~values.isfinite()).nonzero()[0])
        raise RewardError(
            f"the score of response {row} is {float(values[row])}", where="scores", fix="pass a finite number"
        )
    kept = torch.ones(count, dtype=torch.bool, device=device)
    return ScoredRollouts(rollouts, values, None, {"score": values}, kept)
