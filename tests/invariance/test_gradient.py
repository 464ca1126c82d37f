"""The gradient of an optimizer step does not depend on how its rows are split, ordered or padded (float64)."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from keel.config import TrainConfig, parse
from keel.data.batches import Rollouts, TrainingBatch, select_rows
from keel.learn.shaping import ScoreStatistics
from keel.learn.targets import build_targets
from keel.models.actor_critic import ValueUnits
from keel.training.setup import TrainingSetup, build_training_setup
from keel.world import World

from ..runs import PROMPTS, settings, share_of_w3

ONE = World(0, 1, torch.device("cpu"))
GARBAGE = 9  # in the place of pads, which nobody must read


def setup_of(model: Path, **changes: Any) -> TrainingSetup:
    """A run in float64 whose weights stay where they are. All terms of the loss take part."""
    terms = {"algorithm.entropy_coef": 0.01, "algorithm.kl_in": "loss", "algorithm.minibatch_size": 16}
    config = parse(TrainConfig, settings(model, Path("unused"), {**terms, "optim.max_grad_norm": 1e9, **changes}))
    setup = build_training_setup(config, [share_of_w3], PROMPTS, ONE)
    setup.actor_critic.double()
    assert setup.reference is not None
    setup.reference.double()
    head = setup.actor_critic.critic.score if setup.actor_critic.critic is not None else setup.actor_critic.value_head
    torch.nn.init.constant_(head.weight, 0.1)  # at zero it would pass no gradient on to its trunk
    for group in setup.updater.optimizer.param_groups:
        group["initial_lr"] = 0.0
    return setup


def targets_of(setup: TrainingSetup, rollouts: Rollouts) -> TrainingBatch:
    scored = setup.score(rollouts)
    token_scores = setup.shaping.token_scores(scored, ScoreStatistics()).double()
    setup.actor_critic.value_units = ValueUnits()
    targets = build_targets(
        scored, token_scores, setup.actor_critic, setup.reference, setup.algorithm, setup.targets, 0.05, ONE
    )
    setup.actor_critic.value_units = targets.value_units
    return targets.batch


def gradient_of(setup: TrainingSetup, batch: TrainingBatch, budget: int = 10**6) -> tuple[Tensor, dict[str, float]]:
    """All gradients that the optimizer gets, joined, and the metrics."""
    seen: list[Tensor] = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        seen.append(torch.cat([grad.flatten() for grad in grads]))

    handle = setup.updater.optimizer.register_step_pre_hook(look)
    updater = replace(setup.updater, schedule=replace(setup.updater.schedule, microbatch_tokens=budget))
    metrics = updater.update(batch, step=1, kl_coef=0.05, seed=0)
    handle.remove()
    assert len(seen) == 1
    return seen[0], metrics


def padded(batch: Any, left: int, right: int) -> Any:
    """The same rows with more padding on both outer sides."""
    wider = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor) and value.dim() == 2:
            sides = (left, 0) if field.name.startswith("prompt") else (0, right)
            fill = {torch.bool: False, torch.int64: GARBAGE}.get(value.dtype, float("nan"))
            wider[field.name] = pad(value, sides, value=fill)
    return replace(batch, **wider)


AGGREGATED: dict[str, dict[str, Any]] = {
    "by response": {"algorithm.loss_aggregation": "sequence", "algorithm.ratio_level": "sequence"},
    "by a constant": {"algorithm.loss_aggregation": "constant", "algorithm.clip_target": "weight"},
}


@pytest.fixture(
    scope="module",
    params=[
        *("rotary, separate", "rotary, shared", "absolute, separate", "absolute, shared"),
        *("rotary, shared, by response", "rotary, separate, by a constant"),
    ],
)
def setup(request: pytest.FixtureRequest) -> TrainingSetup:
    positions, sharing, *aggregated = request.param.split(", ")
    model = request.getfixturevalue("tiny_policy" if positions == "rotary" else "tiny_gpt2")
    return setup_of(model, **{"critic.sharing": sharing}, **(AGGREGATED[aggregated[0]] if aggregated else {}))


@pytest.fixture(scope="module")
def rollouts(setup: TrainingSetup) -> Rollouts:
    return setup.respond(1)


@pytest.fixture(scope="module")
def batch(setup: TrainingSetup, rollouts: Rollouts) -> TrainingBatch:
    assert rollouts.prompt_mask.sum(1).unique().numel() == 3
    assert rollouts.lengths.unique().numel() > 2
    return targets_of(setup, rollouts)


@pytest.fixture(scope="module")
def expected(setup: TrainingSetup, batch: TrainingBatch) -> tuple[Tensor, dict[str, float]]:
    gradient, metrics = gradient_of(setup, batch)
    assert gradient.dtype == torch.float64
    assert float(gradient.norm()) > 1e-3
    return gradient, metrics


def same(found: tuple[Tensor, dict[str, float]], expected: tuple[Tensor, dict[str, float]]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-10)
    assert found[1] == pytest.approx(expected[1], abs=1e-10)


@pytest.mark.parametrize("budget", [1, 20, 57, 100])
def test_micro_batches(
    setup: TrainingSetup, batch: TrainingBatch, expected: tuple[Tensor, dict[str, float]], budget: int
) -> None:
    """From one row at a time to all at once."""
    same(gradient_of(setup, batch, budget), expected)


@pytest.mark.parametrize("budget", [40, 10**6])
def test_order_of_rows(
    setup: TrainingSetup, batch: TrainingBatch, expected: tuple[Tensor, dict[str, float]], budget: int
) -> None:
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3)).tolist()
    same(gradient_of(setup, select_rows(batch, order), budget), expected)


def test_padding(setup: TrainingSetup, batch: TrainingBatch, expected: tuple[Tensor, dict[str, float]]) -> None:
    same(gradient_of(setup, padded(batch, left=5, right=3)), expected)


def test_padding_of_the_rollouts(setup: TrainingSetup, rollouts: Rollouts, batch: TrainingBatch) -> None:
    found = targets_of(setup, padded(rollouts, left=4, right=2))
    width = batch.response_mask.shape[1]
    for name in ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"):
        ours, theirs = getattr(found, name), getattr(batch, name)
        torch.testing.assert_close(ours[:, :width], theirs, rtol=0, atol=1e-10)
        assert not ours[:, width:].any()


def test_order_of_the_rollouts(setup: TrainingSetup, rollouts: Rollouts, batch: TrainingBatch) -> None:
    order = torch.randperm(16, generator=torch.Generator().manual_seed(4)).tolist()
    found, expected = targets_of(setup, select_rows(rollouts, order)), select_rows(batch, order)
    for name in ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-10)


def test_rows_without_a_counted_token(
    setup: TrainingSetup, batch: TrainingBatch, expected: tuple[Tensor, dict[str, float]]
) -> None:
    """As if they were not there."""
    more = select_rows(batch, [*range(16), 0, 5])
    more.response_mask[16:] = False
    same(gradient_of(setup, more, 40), expected)
