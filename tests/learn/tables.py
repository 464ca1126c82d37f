"""A policy and a critic that are tables, so that every number can be worked out by hand."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from keel.core.logprobs import logprobs_and_entropy
from keel.data.batches import Rollouts, ScoredRollouts, TrainingBatch
from keel.data.prompts import Prompt
from keel.learn.algorithms import ALGORITHMS
from keel.learn.optim import build_optimizer
from keel.learn.targets import TargetSettings
from keel.learn.update import Objective, Updater, UpdateSchedule
from keel.models.actor_critic import Analysis, ValueUnits
from keel.world import World

ONE = World(0, 1, torch.device("cpu"))
PROMPT = Prompt("x", "x", (0,), {})


class Table(nn.Module):
    """The same logits [V] in every state; the value of a state depends on its position alone."""

    def __init__(self, logits: Sequence[float], values: Sequence[float] | None = None) -> None:
        super().__init__()
        self.policy = table(logits)
        self.critic = None if values is None else table(values)
        self.value_units = ValueUnits()

    @property
    def has_critic(self) -> bool:
        return self.critic is not None

    def policy_parameters(self) -> list[nn.Parameter]:
        return [self.policy.weight]

    def critic_parameters(self) -> list[nn.Parameter]:
        return [] if self.critic is None else [self.critic.weight]

    def models_read(self, with_values: bool, with_logprobs: bool) -> list[nn.Module]:
        return []

    def analyze(
        self,
        batch: Rollouts | TrainingBatch,
        temperature: float,
        entropy_gradient: bool = False,
        with_values: bool = True,
        with_logprobs: bool = True,
    ) -> Analysis:
        mask = batch.response_mask
        logits = self.policy.weight[:, 0].expand(*mask.shape, -1)
        logprobs, spread = (
            statistic.masked_fill(~mask, 0.0)
            for statistic in logprobs_and_entropy(logits, batch.response_tokens, temperature, entropy_gradient=True)
        )
        if self.critic is None or not with_values:
            return Analysis(logprobs, spread, None, None)
        values = self.value_units.values(self.critic.weight[:, 0])
        return Analysis(
            logprobs, spread, values[: mask.shape[1]].expand(mask.shape).masked_fill(~mask, 0.0), values[mask.sum(1)]
        )


def table(numbers: Sequence[float]) -> nn.Linear:
    layer = nn.Linear(1, len(numbers), bias=False)
    with torch.no_grad():
        layer.weight[:, 0] = torch.tensor(numbers)
    return layer


def rollouts(responses: Sequence[Sequence[int]], truncated: Sequence[bool] | None = None) -> Rollouts:
    """Answers of given tokens to a prompt of one token."""
    count, width = len(responses), max(map(len, responses))
    tokens = torch.tensor([[*response, *[0] * (width - len(response))] for response in responses])
    mask = torch.tensor([[t < len(response) for t in range(width)] for response in responses])
    return Rollouts(
        prompts=[PROMPT] * count,
        prompt_tokens=torch.zeros(count, 1, dtype=torch.long),
        prompt_mask=torch.ones(count, 1, dtype=torch.bool),
        response_tokens=tokens,
        response_mask=mask,
        logprobs=torch.zeros(tokens.shape),
        truncated=torch.tensor(truncated or [False] * count),
        texts=[""] * count,
    )


def scored(
    responses: Rollouts,
    scores: Sequence[float],
    kept: Sequence[bool] | None = None,
    segment_scores: Sequence[Sequence[float]] | None = None,
) -> ScoredRollouts:
    return ScoredRollouts(
        rollouts=responses,
        scores=torch.tensor(scores),
        segment_scores=None if segment_scores is None else torch.tensor(segment_scores),
        by_scorer={},
        kept=torch.tensor(kept or [True] * len(scores)),
    )


def batch_of(
    responses: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float]],
    advantages: Sequence[Sequence[float]],
    **others: Sequence[Sequence[float]],
) -> TrainingBatch:
    """A batch of given numbers, one for each token; ref_logprobs, values, rewards and returns are zero if not given,
    and weights are one."""
    given = rollouts(responses)
    zeros = [[0.0] * given.response_mask.shape[1]] * len(responses)
    numbers: dict[str, Any] = dict.fromkeys(("ref_logprobs", "values", "rewards", "returns"), zeros)
    ones = [[1.0] * given.response_mask.shape[1]] * len(responses)
    numbers |= {"logprobs": logprobs, "advantages": advantages, "weights": ones} | others
    return TrainingBatch(
        prompt_tokens=given.prompt_tokens,
        prompt_mask=given.prompt_mask,
        response_tokens=given.response_tokens,
        response_mask=given.response_mask,
        **{name: torch.tensor(value) for name, value in numbers.items()},
    )


def target_settings(**changes: Any) -> TargetSettings:
    settings: dict[str, Any] = {
        "temperature": 1.0,
        "group_size": 1,
        "microbatch_tokens": 1000,
        "kl_in": "reward",
        "kl_estimator": "k1",
        "gamma": 1.0,
        "gae_lambda": 0.95,
        "whiten_advantages": False,
        "normalize_std": True,
        "truncation": "terminal",
        "correction_cap": None,
    }
    return TargetSettings(**(settings | changes))


def updater(model: Table, name: str = "ppo", rate: float = 0.1, **changes: Any) -> Updater:
    """One epoch, one minibatch, no clipping of gradients, no terms besides policy and value loss."""
    objective: dict[str, Any] = {
        "temperature": 1.0,
        "clip_range_low": 0.2,
        "clip_range_high": 0.2,
        "dual_clip": None,
        "value_clip_range": None,
        "value_coef": 0.5,
        "entropy_coef": 0.0,
        "kl_in": "reward",
        "kl_estimator": "k1",
        "loss_aggregation": "token",
        "ratio_level": "token",
        "clip_target": "loss",
        "max_response_tokens": 4,
    }
    schedule: dict[str, Any] = {
        "update_epochs": 1,
        "minibatch_size": 1_000_000,
        "microbatch_tokens": 1000,
        "max_approx_kl": None,
        "max_grad_norm": 1e9,
        "schedule": "constant",
        "warmup_steps": 0,
        "total_steps": 1,
    }
    for key, value in changes.items():
        (objective if key in objective else schedule)[key] = value
    return Updater(
        actor_critic=model,  # type: ignore[arg-type]
        optimizer=build_optimizer([(model.policy_parameters(), rate), (model.critic_parameters(), rate)]),
        algorithm=ALGORITHMS[name],
        objective=Objective(**objective),
        schedule=UpdateSchedule(**schedule),
        world=ONE,
    )


def updated(learner: Updater, batch: TrainingBatch, **settings: Any) -> tuple[dict[str, float], list[list[Tensor]]]:
    """The metrics of an update, and the gradients that the optimizer saw at each of its steps (zeros for none)."""
    seen: list[list[Tensor]] = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        seen.append([(torch.zeros_like(p) if p.grad is None else p.grad.clone()).flatten() for p in parameters])

    handle = learner.optimizer.register_step_pre_hook(look)
    metrics = learner.update(batch, **({"step": 1, "kl_coef": 0.0, "seed": 0} | settings))
    handle.remove()
    return metrics, seen
