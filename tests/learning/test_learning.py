"""A tiny random model learns an easy reward in seconds, whatever the algorithm; the same seed gives the same run."""

import statistics
from pathlib import Path
from typing import Any

import pytest

from ..runs import train, without_clock

RATE = {"optim.learning_rate": 1e-2, "algorithm.kl_coef": 0.02, "rollout.batch_size": 32}
RUNS: dict[str, dict[str, Any]] = {
    "ppo": {"steps": 12, "algorithm.update_epochs": 2},
    "a2c": {"steps": 25},
    "reinforce": {"steps": 25},
    "rloo": {"steps": 25},
    "grpo": {"steps": 25},
    "reinforce++": {"steps": 25},
    "reinforce++_base": {"steps": 25},
}


@pytest.mark.parametrize("name", list(RUNS))
def test_learns_to_say_w3(name: str, tiny_policy: Path, tmp_path: Path) -> None:
    """A random policy says w3 in 1 word of 25; a trained one nearly always, and knows what its answers are worth."""
    metrics = train(tiny_policy, tmp_path / "run", {"algorithm.name": name, **RATE, **RUNS[name]})
    scores = [line["objective/scores"] for line in metrics]
    assert scores[0] < 0.15
    assert sum(scores[-3:]) / 3 > 0.5
    assert 0 < metrics[-1]["objective/kl"] < 30
    assert statistics.median(line["policy/ratio"] for line in metrics) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_the_same_seed_is_the_same_run(name: str, tiny_policy: Path, tmp_path: Path) -> None:
    runs = [
        train(tiny_policy, tmp_path / str(i), {"algorithm.name": name, "seed": seed, "log.rollouts_per_step": 16})
        for i, seed in enumerate((5, 5, 6))
    ]
    same, again, other = (without_clock(run) for run in runs)
    answers = [(tmp_path / str(i) / "rollouts.jsonl").read_bytes() for i in range(3)]
    weights = [(tmp_path / str(i) / "policy" / "model.safetensors").read_bytes() for i in range(3)]
    assert same == again
    assert answers[0] == answers[1]
    assert weights[0] == weights[1]
    assert same != other
    assert answers[0] != answers[2]
    assert weights[0] != weights[2]
