"""TrainingBatch -> updated weights: epochs of minibatches of micro-batches over one batch.

Losses are summed over the counted tokens and divided by their number in the full optimizer step, over all
micro-batches and ranks. The split into micro-batches therefore never changes the result.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW

from keel.core.diagnostics import approx_kl, clipfrac
from keel.core.kl import kl_estimate, without_rounding
from keel.core.losses import aggregation_weights, likelihood_ratio, sequence_level_logprobs, value_loss
from keel.data.batches import TrainingBatch, select_rows
from keel.failpoints import failpoint, inject_nan
from keel.learn.algorithms import Algorithm, Loss
from keel.learn.gather import deal_rows
from keel.learn.guard import Guard, find_fault
from keel.learn.optim import clip_gradients, gradient_norm, learning_rate_factor, microbatches, set_learning_rate
from keel.learn.totals import Totals
from keel.models.actor_critic import ActorCritic, Analysis
from keel.models.sharding import idle_passes
from keel.world import World, generator, run_concurrently

SMALL = 2**21
"""Number of weights up to which the graphs of policy and critic are small enough to be in memory together."""


@dataclass(frozen=True)
class Objective:
    """Settings of the loss."""

    temperature: float
    clip_range_low: float
    clip_range_high: float
    dual_clip: float | None
    value_clip_range: float | None
    value_coef: float
    entropy_coef: float
    kl_in: str
    kl_estimator: str
    loss_aggregation: str
    ratio_level: str
    clip_target: str
    max_response_tokens: int


@dataclass(frozen=True)
class UpdateSchedule:
    """How a batch is divided into optimizer steps, and their learning rate."""

    update_epochs: int
    minibatch_size: int  # responses, over all ranks
    microbatch_tokens: int
    max_approx_kl: float | None
    max_grad_norm: float
    schedule: str
    warmup_steps: int
    total_steps: int


@dataclass(frozen=True)
class Updater:
    """Updates policy and critic jointly, with one loss and one optimizer."""

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
        """Run all epochs over one batch and return the metrics. Raises Diverged before a faulty optimizer step.

        Args:
            batch: the responses of all ranks. Its minibatches are the same for any number of ranks.
            step_scale: factor of the policy's learning rate; with 0 only the critic learns.
        """
        totals = Totals()
        minibatches = self._minibatches_per_epoch(batch)
        tokens = (batch.prompt_mask.sum(1) + batch.response_mask.sum(1)).tolist()
        for epoch in range(self.schedule.update_epochs):
            epoch_totals = Totals(self._token_metrics())
            order = torch.randperm(batch.size, generator=generator(seed, "minibatch", step, epoch))
            for index, rows in enumerate(order.tensor_split(minibatches)):
                done = ((step - 1) * self.schedule.update_epochs + epoch) * minibatches + index
                dealt = deal_rows(rows.tolist(), tokens, self.world.size)[self.world.rank]
                self._optimizer_step(batch, dealt, done, minibatches, kl_coef, step_scale, epoch_totals)
                if epoch == index == 0:  # no weight had moved yet, so any difference from the sampler is a fault
                    first_approx_kl = epoch_totals.reduce(self.world)["policy/approx_kl"]
            totals.merge(epoch_totals)
            drift = epoch_totals.reduce(self.world)["policy/approx_kl"]
            if self.schedule.max_approx_kl is not None and drift > self.schedule.max_approx_kl:
                break
        return {
            **totals.reduce(self.world),
            "policy/first_approx_kl": first_approx_kl,
            "policy/update_epochs": epoch + 1,
        }

    @cached_property
    def _small(self) -> bool:
        return sum(parameter.numel() for parameter in self.actor_critic.policy.parameters()) <= SMALL

    def _token_metrics(self) -> list[str]:
        """Return the names of the metrics per token. A rank whose responses were all dropped needs them as well."""
        value = ["loss/value"] if self.actor_critic.has_critic else []
        kl = ["loss/kl"] if self.objective.kl_in == "loss" else []
        return ["loss/policy", "policy/approx_kl", "policy/clipfrac", "policy/entropy", "policy/ratio", *value, *kl]

    def _minibatches_per_epoch(self, batch: TrainingBatch) -> int:
        return max(1, batch.size // self.schedule.minibatch_size)

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
        lengths = batch.response_mask[torch.tensor(rows, dtype=torch.long)].sum(1)
        num_loss_tokens, num_responses = self.world.sum(torch.stack([lengths.sum(), (lengths > 0).sum()])).tolist()
        if num_loss_tokens == 0:
            totals.add_one("update/skipped", 0.0)
            return
        factor = learning_rate_factor(
            self.schedule.schedule,
            optimizer_step,
            self.schedule.total_steps * self.schedule.update_epochs * minibatches,
            self.schedule.warmup_steps,
        )
        set_learning_rate(self.optimizer, factor, step_scale)
        metrics, selected = Totals(), list(self._microbatches(batch, rows))
        metrics.add_one("policy/learning_rate", self.optimizer.param_groups[0]["initial_lr"] * factor)
        passes = self._passes(kl_coef, metrics, num_loss_tokens, num_responses)
        # Small models are read at the same time. Of others, one is updated and its gradient freed before the next.
        taken = [
            self._update_models(together, selected, num_loss_tokens, step_scale, metrics)
            for together in ([passes] if self._small else [[each] for each in passes])
        ]
        if all(taken):
            totals.merge(metrics)
        totals.add_one("update/skipped", float(not all(taken)))

    def _update_models(
        self,
        passes: Sequence["Pass"],
        selected: Sequence[TrainingBatch],
        num_loss_tokens: float,
        step_scale: float,
        totals: Totals,
    ) -> bool:
        """Take one optimizer step with the models of these passes. Return whether the guard admitted all of them."""
        finite = [True] * len(passes)
        for microbatch in selected:
            jobs = [partial(_backward, partial(each.loss, microbatch), num_loss_tokens) for each in passes]
            finite = [old and new for old, new in zip(finite, run_concurrently(*jobs), strict=True)]
        admitted = [self._admit(*each, step_scale, totals) for each in zip(passes, finite, strict=True)]
        failpoint("update.optimizer")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return all(admitted)

    def _microbatches(self, batch: TrainingBatch, rows: Sequence[int]) -> Iterator[TrainingBatch]:
        """Yield the micro-batches of rows with counted tokens, then as many without as other ranks have more."""
        lengths = (batch.prompt_mask.sum(1) + batch.response_mask.sum(1)).tolist()
        counted = [row for row in rows if bool(batch.response_mask[row].any())]
        groups = microbatches([lengths[row] for row in counted], self.schedule.microbatch_tokens)
        idle = idle_passes(self.actor_critic.policy, len(groups))
        for group in groups:
            yield select_rows(batch, [counted[place] for place in group])
        for _ in range(idle):
            shortest = select_rows(batch, [min(range(batch.size), key=lambda row: lengths[row])])
            yield replace(shortest, response_mask=torch.zeros_like(shortest.response_mask))

    def _passes(self, kl_coef: float, totals: Totals, num_loss_tokens: float, num_responses: float) -> list["Pass"]:
        """Return a pass for each trunk. They share no weights and no metrics, so that they can run at the same time."""
        objective, models = self.objective, self.actor_critic
        has_separate_critic = models.critic is not None

        def compute_policy_loss(microbatch: TrainingBatch) -> Tensor:
            analysis = models.analyze(
                microbatch, objective.temperature, objective.entropy_coef > 0, with_values=not has_separate_critic
            )
            scaled = self._aggregation(microbatch.response_mask, num_loss_tokens, num_responses)
            loss = self._policy_loss(analysis, microbatch, kl_coef, scaled, totals)
            return (loss if analysis.values is None else loss + self._value_loss(analysis, microbatch, totals)).sum()

        def compute_critic_loss(microbatch: TrainingBatch) -> Tensor:
            analysis = models.analyze(microbatch, objective.temperature, with_logprobs=False)
            return self._value_loss(analysis, microbatch, totals).sum()

        policy, critic = models.policy_parameters(), models.critic_parameters()
        if has_separate_critic:
            return [Pass(compute_policy_loss, {"policy": policy}), Pass(compute_critic_loss, {"critic": critic})]
        return [Pass(compute_policy_loss, {"policy": policy} | ({"critic": critic} if critic else {}))]

    def _aggregation(
        self, response_mask: Tensor, num_loss_tokens: float, num_responses: float
    ) -> Callable[[Tensor], Tensor]:
        """Return the function that gives the losses of the counted tokens [N] their weights in the mean over tokens."""
        aggregation, limit = self.objective.loss_aggregation, self.objective.max_response_tokens
        if aggregation == "token":
            return lambda losses: losses
        weights = aggregation_weights(response_mask, aggregation, num_loss_tokens, num_responses, limit)
        return lambda losses: losses * weights.to(losses.dtype)

    def _policy_loss(
        self,
        analysis: Analysis,
        microbatch: TrainingBatch,
        kl_coef: float,
        scaled: Callable[[Tensor], Tensor],
        totals: Totals,
    ) -> Tensor:
        """Compute policy loss - entropy_coef * entropy (+ KL) per counted token, times its weight. -> [N]"""
        objective, mask = self.objective, microbatch.response_mask
        new_logprobs, entropy = analysis.logprobs[mask], analysis.entropy[mask]
        logprobs, advantages = microbatch.logprobs[mask], microbatch.advantages[mask]
        low, high, by_weight = objective.clip_range_low, objective.clip_range_high, objective.clip_target == "weight"
        in_ratio = logprobs
        if objective.ratio_level == "sequence":
            in_ratio = sequence_level_logprobs(new_logprobs, logprobs, mask)
        policy = self.algorithm.policy_loss(
            Loss(new_logprobs, in_ratio, advantages, low, high, objective.dual_clip, by_weight)
        )
        policy = scaled(policy * microbatch.weights[mask])
        loss = policy - objective.entropy_coef * scaled(entropy) if objective.entropy_coef else policy
        if objective.kl_in == "loss":
            ref_logprobs = without_rounding(microbatch.ref_logprobs[mask], new_logprobs)
            kl = scaled(kl_coef * kl_estimate(new_logprobs, ref_logprobs, objective.kl_estimator))
            loss = loss + kl
            totals.add("loss/kl", kl)
        with torch.no_grad():
            totals.add("loss/policy", policy)
            totals.add("policy/entropy", entropy)
            totals.add("policy/approx_kl", approx_kl(new_logprobs, logprobs))
            totals.add("policy/ratio", likelihood_ratio(new_logprobs, logprobs))
            totals.add("policy/clipfrac", clipfrac(new_logprobs, in_ratio, advantages, low, high, by_weight))
        return loss

    def _value_loss(self, analysis: Analysis, microbatch: TrainingBatch, totals: Totals) -> Tensor:
        """Compute value_coef * value loss per counted token. -> [N]"""
        mask, unit = microbatch.response_mask, self.actor_critic.value_units.unit
        assert analysis.values is not None
        new_values, values, returns = (x[mask] / unit for x in (analysis.values, microbatch.values, microbatch.returns))
        value = value_loss(new_values, values, returns, self.objective.value_clip_range)
        totals.add("loss/value", value)
        return self.objective.value_coef * value

    def _admit(self, each: "Pass", finite: bool, step_scale: float, totals: Totals) -> bool:
        """Clip the gradient of each model of a pass, or drop the gradients if the guard refuses one.

        With a step scale of 0, in critic warm-up, the policy does not move.
        """
        models = {name: model for name, model in each.models.items() if step_scale or name != "policy"}
        norms = {name: inject_nan("update.gradient", gradient_norm(model)) for name, model in models.items()}
        sizes = {name: float(norm) for name, norm in norms.items()}
        fault = find_fault(not self.world.any(not finite), sizes, self.actor_critic.named_parameters())
        admitted = self.guard.admits(sizes, fault)
        for name, model in each.models.items():
            if admitted and name in models:
                totals.add_one(f"{name}/grad_norm", sizes[name])
                clip_gradients(model, self.schedule.max_grad_norm, norms[name])
            else:
                for parameter in model:
                    parameter.grad = None
        return admitted


@dataclass(frozen=True)
class Pass:
    """The pass of a trunk: its loss, summed over the counted tokens, and the weights of the models that it trains."""

    loss: Callable[[TrainingBatch], Tensor]
    models: Mapping[str, Sequence[Parameter]]


def _backward(loss: Callable[[], Tensor], num_loss_tokens: float) -> bool:
    """Add the gradient of the loss. Return whether the loss is finite."""
    value = inject_nan("update.loss", loss())
    (value / num_loss_tokens).backward()  # of a loss that is not finite too: other ranks wait for its gradient
    return bool(value.isfinite())
