"""TrainingBatch -> updated weights: epochs of minibatches of micro-batches over one batch.

Losses are summed over the counted tokens and divided by their number in the whole optimizer step, all micro-batches
and ranks together. So the split into micro-batches never changes the result.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.optim import AdamW

from keel.core.diagnostics import approx_kl, clipfrac
from keel.core.kl import kl_estimate, without_rounding
from keel.core.losses import likelihood_ratio, value_loss
from keel.data.batches import TrainingBatch, select_rows
from keel.failpoints import failpoint, poison
from keel.learn.algorithms import Algorithm, Loss
from keel.learn.guard import Guard, find_fault
from keel.learn.optim import clip_gradients, gradient_norm, learning_rate_factor, microbatches, set_learning_rate
from keel.learn.totals import Totals
from keel.models.actor_critic import ActorCritic, Analysis
from keel.world import World, at_once, generator

SMALL = 2**21
"""Up to so many weights the graphs of policy and critic are small enough to be in memory together."""


@dataclass(frozen=True)
class Objective:
    """The numbers of the loss."""

    temperature: float
    clip_range_low: float
    clip_range_high: float
    dual_clip: float | None
    value_clip_range: float | None
    value_coef: float
    entropy_coef: float
    kl_in: str
    kl_estimator: str


@dataclass(frozen=True)
class UpdateSchedule:
    """How a batch is walked through."""

    update_epochs: int
    minibatch_size: int  # of all ranks
    microbatch_tokens: int
    max_approx_kl: float | None
    max_grad_norm: float
    schedule: str
    warmup_steps: int
    total_steps: int


@dataclass(frozen=True)
class Updater:
    """Policy and critic are optimised jointly: one loss, one backward pass, one optimizer."""

    actor_critic: ActorCritic
    optimizer: AdamW
    algorithm: Algorithm
    objective: Objective
    schedule: UpdateSchedule
    world: World
    guard: Guard = field(default_factory=Guard)

    def update(
        self,
        batch: TrainingBatch,
        step: int,
        kl_coef: float,
        seed: int,
        step_scale: float = 1.0,
    ) -> dict[str, float]:
        """All epochs over one batch; returns the metrics. Raises Diverged instead of a step that would do harm.

        `step_scale` is a factor of the policy's learning rate; with 0 the critic alone learns.
        """
        totals = Totals()
        minibatches = self._minibatches_per_epoch(batch)
        for epoch in range(self.schedule.update_epochs):
            epoch_totals = Totals(self._figures())
            order = torch.randperm(batch.size * self.world.size, generator=generator(seed, "minibatch", step, epoch))
            for index, rows in enumerate(order.tensor_split(minibatches)):
                done = ((step - 1) * self.schedule.update_epochs + epoch) * minibatches + index
                self._optimizer_step(
                    batch, self._own(rows, batch.size), done, minibatches, kl_coef, step_scale, epoch_totals
                )
                if epoch == index == 0:  # nothing has moved yet: whatever they differ by is a fault
                    before_moving = epoch_totals.reduce(self.world)["policy/approx_kl"]
            totals.merge(epoch_totals)
            drift = epoch_totals.reduce(self.world)["policy/approx_kl"]
            if self.schedule.max_approx_kl is not None and drift > self.schedule.max_approx_kl:
                break
        return {
            **totals.reduce(self.world),
            "policy/first_approx_kl": before_moving,
            "policy/update_epochs": epoch + 1,
        }

    @cached_property
    def _small(self) -> bool:
        return sum(parameter.numel() for parameter in self.actor_critic.policy.parameters()) <= SMALL

    def _own(self, rows: Tensor, size: int) -> list[int]:
        """Which of a minibatch's rows, counted over all ranks, are this rank's; the split is the same for any size."""
        first = self.world.rank * size
        return [row - first for row in rows.tolist() if first <= row < first + size]

    def _figures(self) -> list[str]:
        """Names of the figures per token: a rank whose responses were all dropped has them too."""
        value = ["loss/value"] if self.actor_critic.has_critic else []
        kl = ["loss/kl"] if self.objective.kl_in == "loss" else []
        return ["loss/policy", "policy/approx_kl", "policy/clipfrac", "policy/entropy", "policy/ratio", *value, *kl]

    def _minibatches_per_epoch(self, batch: TrainingBatch) -> int:
        return max(1, batch.size * self.world.size // self.schedule.minibatch_size)

    def _optimizer_step(
        self,
        batch: TrainingBatch,
        rows: Sequence[int],
        optimizer_step: int,
        minibatches: int,
        kl_coef: float,
        step_scale: float,
        totals: Totals,
    ) -> None:
        num_loss_tokens = float(self.world.sum(batch.response_mask[torch.tensor(rows, dtype=torch.long)].sum()))
        if num_loss_tokens == 0:
            totals.add_one("update/skipped", 0.0)
            return
        metrics, finite = Totals(), True
        for part in self._parts(batch, rows):
            jobs = [partial(_backward, loss, num_loss_tokens) for loss in self._losses(part, kl_coef, metrics)]
            # Of small models both graphs fit in memory; of others one can go before the next is built.
            finite &= all(at_once(*jobs) if self._small else [job() for job in jobs])
        factor = learning_rate_factor(
            self.schedule.schedule,
            optimizer_step,
            self.schedule.total_steps * self.schedule.update_epochs * minibatches,
            self.schedule.warmup_steps,
        )
        set_learning_rate(self.optimizer, factor, step_scale)
        metrics.add_one("policy/learning_rate", self.optimizer.param_groups[0]["initial_lr"] * factor)
        taken = self._step(step_scale, finite, metrics)
        if taken:
            totals.merge(metrics)
        totals.add_one("update/skipped", float(not taken))

    def _parts(self, batch: TrainingBatch, rows: Sequence[int]) -> Iterator[TrainingBatch]:
        lengths = (batch.prompt_mask.sum(1) + batch.response_mask.sum(1)).tolist()
        counted = [row for row in rows if bool(batch.response_mask[row].any())]
        for group in microbatches([lengths[row] for row in counted], self.schedule.microbatch_tokens):
            yield select_rows(batch, [counted[place] for place in group])

    def _losses(self, part: TrainingBatch, kl_coef: float, totals: Totals) -> list[Callable[[], Tensor]]:
        """How to compute each trunk's loss, summed over the counted tokens. They share no weights and no figures."""
        aim, models = self.objective, self.actor_critic
        alone = models.critic is not None

        def policy() -> Tensor:
            found = models.analyze(part, aim.temperature, aim.entropy_coef > 0, with_values=not alone)
            loss = self._policy_loss(found, part, kl_coef, totals)
            return (loss if found.values is None else loss + self._value_loss(found, part, totals)).sum()

        def critic() -> Tensor:
            found = models.analyze(part, aim.temperature, with_logprobs=False)
            return self._value_loss(found, part, totals).sum()

        return [policy, critic] if alone else [policy]

    def _policy_loss(self, found: Analysis, part: TrainingBatch, kl_coef: float, totals: Totals) -> Tensor:
        """policy loss - entropy_coef * entropy (+ KL), for each counted token."""
        aim, mask = self.objective, part.response_mask
        new_logprobs, logprobs, advantages = found.logprobs[mask], part.logprobs[mask], part.advantages[mask]
        entropy = found.entropy[mask]
        policy = self.algorithm.policy_loss(
            Loss(new_logprobs, logprobs, advantages, aim.clip_range_low, aim.clip_range_high, aim.dual_clip)
        )
        loss = policy - aim.entropy_coef * entropy if aim.entropy_coef else policy
        if aim.kl_in == "loss":
            ref_logprobs = without_rounding(part.ref_logprobs[mask], new_logprobs)
            kl = kl_coef * kl_estimate(new_logprobs, ref_logprobs, aim.kl_estimator)
            loss = loss + kl
            totals.add("loss/kl", kl)
        with torch.no_grad():
            totals.add("loss/policy", policy)
            totals.add("policy/entropy", entropy)
            totals.add("policy/approx_kl", approx_kl(new_logprobs, logprobs))
            totals.add("policy/ratio", likelihood_ratio(new_logprobs, logprobs))
            totals.add(
                "policy/clipfrac",
                clipfrac(new_logprobs, logprobs, advantages, aim.clip_range_low, aim.clip_range_high),
            )
        return loss

    def _value_loss(self, found: Analysis, part: TrainingBatch, totals: Totals) -> Tensor:
        """value_coef * value loss, for each counted token."""
        aim, mask = self.objective, part.response_mask
        assert found.values is not None
        unit = self.actor_critic.value_units.unit
        new_values, values, returns = (x[mask] / unit for x in (found.values, part.values, part.returns))
        value = value_loss(new_values, values, returns, aim.value_clip_range)
        totals.add("loss/value", value)
        return aim.value_coef * value

    def _step(self, step_scale: float, finite: bool, totals: Totals) -> bool:
        """Clip each model's gradient, then move, if that does no harm. In critic warm-up the policy stays in place."""
        policy, critic = self.actor_critic.policy_parameters(), self.actor_critic.critic_parameters()
        if self.world.size > 1:
            finite = not float(self.world.sum(torch.tensor(float(not finite), device=self.world.device)))
            for parameter in policy + critic:
                own = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
                own = own if parameter.grad is None else parameter.grad
                parameter.grad = self.world.sum(own)  # every rank takes part, even one that had nothing to learn from
        if step_scale == 0:
            for parameter in policy:
                parameter.grad = None
        models = ({"policy": policy} if step_scale else {}) | ({"critic": critic} if critic else {})
        norms = {name: poison("update.gradient", gradient_norm(model)) for name, model in models.items()}
        sizes = {name: float(norm) for name, norm in norms.items()}
        taken = self.guard.admits(sizes, find_fault(finite, sizes, self.actor_critic.named_parameters()))
        if taken:
            for name, model in models.items():
                totals.add_one(f"{name}/grad_norm", sizes[name])
                clip_gradients(model, self.schedule.max_grad_norm, norms[name])
            failpoint("update.optimizer")
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return taken


def _backward(loss: Callable[[], Tensor], num_loss_tokens: float) -> bool:
    """Add the gradient of a loss that is finite; whether it is."""
    value = poison("update.loss", loss())
    finite = bool(value.isfinite())
    if finite:
        (value / num_loss_tokens).backward()
    return finite
