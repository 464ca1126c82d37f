"""The losses of `keel dpo` on two rankings, worked out by hand."""

import math
from typing import Any

import pytest
import torch

from keel.config import DpoConfig, parse
from keel.data.preferences import Ranking
from keel.supervised.dpo_losses import nll_losses, response_rewards, total_losses

RANKINGS = [Ranking("a", ("x", "y"), (1, 2)), Ranking("b", ("x", "y", "z"), (1, 1, 2), weight=2.0)]
LOGPROBS = torch.tensor([-2.0, -3.0, -4.0, -2.0, -6.0], dtype=torch.float64)
LENGTHS = torch.tensor([2.0, 1.0, 4.0, 1.0, 2.0], dtype=torch.float64)
REFERENCE = torch.tensor([-4.0, -2.0, -4.0, -3.0, -2.0], dtype=torch.float64)


def settings(**given: Any) -> DpoConfig:
    return parse(DpoConfig, {"output": "run", "model": "model", "data": {"path": "rows.jsonl"}, **given})


@pytest.mark.parametrize(
    ("given", "rewards"),
    [
        ({"beta": 0.5}, [1.0, -0.5, 0.0, 0.5, -2.0]),
        ({"beta": 0.5, "length_normalized": True}, [0.5, -0.5, 0.0, 0.5, -1.0]),
        ({"loss": "simpo", "beta": 2.0}, [-2.0, -6.0, -2.0, -4.0, -6.0]),
        # log(p / (1 - p)) of p = e^-1, e^-3, e^-1, e^-2, e^-3: -log(e^k - 1)
        ({"loss": "orpo"}, [-0.5413248546, -2.9489308, -0.5413248546, -1.8545865, -2.9489308]),
    ],
)
def test_rewards_of_responses(given: dict[str, Any], rewards: list[float]) -> None:
    config = settings(**given)
    found = response_rewards(LOGPROBS, LENGTHS, REFERENCE if config.has_reference else None, config)
    assert found.tolist() == pytest.approx(rewards, abs=1e-7)


def test_nll_of_the_best_responses() -> None:
    """2 / 2; (4 / 4 + 2 / 1) / 2 of the two that share the first rank, times the weight 2."""
    assert nll_losses(LOGPROBS, LENGTHS, RANKINGS).tolist() == pytest.approx([1.0, 3.0])


@pytest.mark.parametrize(
    ("given", "first"),
    [
        ({"beta": 0.5}, 0.2014132780),  # log(1 + e^-1.5)
        ({"beta": 0.5, "nll_coef": 0.25}, 0.4514132780),
        ({"beta": 0.5, "length_normalized": True}, 0.3132616875),  # log(1 + e^-1)
        ({"loss": "simpo", "beta": 0.5}, 0.3132616875),
        ({"loss": "simpo", "beta": 0.5, "target_margin": 1.0}, 0.6931471806),
        ({"loss": "simpo", "beta": 0.5, "label_smoothing": 0.25}, 0.5632616875),  # + a quarter of the difference 1
        # odds 1 / (e - 1) and 1 / (e^3 - 1), their ratio 11.107338, log(1 + 1 / 11.107338) = 0.0862057; 1 + 0.5 * that
        ({"loss": "orpo", "beta": 0.5}, 1.0431028723),
        ({"loss": "ipo", "beta": 0.5, "length_normalized": True}, 1.0),  # (2 - 1)^2
    ],
)
def test_the_loss_of_a_pair(given: dict[str, Any], first: float) -> None:
    config = settings(**given)
    rewards = response_rewards(LOGPROBS, LENGTHS, REFERENCE if config.has_reference else None, config)
    losses = total_losses(LOGPROBS, LENGTHS, rewards, RANKINGS, config)
    assert losses[0].item() == pytest.approx(first, abs=1e-6)
    assert math.isfinite(losses[1].item())
