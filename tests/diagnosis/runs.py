"""Synthetic runs, as metrics.jsonl would have them: a healthy one, and the type of a fault that changes it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keel.run.read.run import Run, State

STEPS = 40
Lines = dict[str, Any]


def settings(steps: int = STEPS, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "steps": steps,
        "policy": {"model": "base", "dtype": "float32"},
        "rollout": {"batch_size": 64, "group_size": 1, "max_response_tokens": 40},
        "rewards": [{"model": "runs/reward/model", "weight": 1.0}, {"function": "judge.py:judge", "weight": 0.0}],
        "reward": {"normalize": "none", "missing_eos_penalty": 1.0},
        "algorithm": {"name": "ppo", "kl_coef": 0.05, "gae_lambda": 0.95, "update_epochs": 4, "minibatch_size": 16},
        "optim": {"learning_rate": 3e-4, "warmup_steps": 0, "schedule": "linear", "max_grad_norm": 1.0},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            values[section][key] = value
        else:
            values[section] = value
    return values


def healthy(seed: int = 0, steps: int = STEPS, scale: float = 1.0, length: float = 22.0) -> Lines:
    """Return the columns of a run that learns: score and KL saturate, and the critic learns the returns."""
    random = np.random.default_rng(seed)

    def noise(size: float) -> Any:
        return size * random.standard_normal(steps)

    done = np.linspace(0, 1, steps)
    learned = 1 - np.exp(-4 * done)
    spread = scale * (1.3 - 0.7 * learned)
    scores = scale * (-0.3 + 1.8 * learned) + noise(0.13 * scale)
    kl = 5 * learned**2 + np.abs(noise(0.1)) * (done > 0)
    lengths = length * (1 - 0.2 * learned) + noise(0.02 * length)
    returns = scores - 0.05 * scale * kl
    return {
        "objective/scores": scores,
        "objective/scores_std": spread * (1 + noise(0.05)),
        "objective/scores_low": scores - 1.3 * spread,
        "objective/scores_median": scores + noise(0.05 * scale),
        "objective/scores_high": scores + 1.2 * spread,
        "objective/shaped_scores": scores,
        "objective/shaped_scores_std": spread,
        "objective/kl": kl,
        "objective/kl_coef": np.full(steps, 0.05 * scale),
        "objective/non_score_reward": -0.05 * scale * kl,
        "objective/rlhf_reward": returns,
        "objective/reference_logprob": -0.55 - 0.15 * learned + noise(0.01),
        "rewards/reward": scores,
        "rewards/judge": 2 * learned + noise(0.13),
        "spread/reward": spread,
        "spread/judge": 1.2 - 0.5 * learned,
        "agreement/reward": np.ones(steps),
        "agreement/judge": 0.75 - 0.2 * learned + noise(0.05),
        "outside_range/reward": np.abs(noise(0.01)),
        "response/length": lengths,
        "response/length_std": np.full(steps, 0.2 * length),
        "response/length_correlation": noise(0.1),
        "response/truncated": np.abs(noise(0.01)),
        "response/distinct": 1 - 0.05 * learned,
        "response/repetition": np.abs(noise(0.003)),
        "prompts/distinct": np.ones(steps),
        "reward/dropped": np.zeros(steps),
        "update/skipped": np.zeros(steps),
        "sampler/approx_kl": np.abs(noise(1e-8)),
        "policy/learning_rate": 3e-4 * (1 - done),
        "policy/entropy": 0.55 - 0.2 * learned + noise(0.01),
        "policy/approx_kl": 0.02 * np.exp(noise(0.5)) * (1 - 0.9 * done),
        "policy/step_kl": 0.03 * np.exp(noise(0.7)) * (1 - 0.9 * done),
        "policy/clipfrac": 0.04 + np.abs(noise(0.01)),
        "policy/grad_norm": 0.4 + np.abs(noise(0.05)),
        "critic/values": returns - scale * 0.3 * np.exp(-8 * done),
        "critic/returns": returns,
        "critic/returns_std": spread,
        "critic/advantages_std": spread * np.sqrt(1 - 0.6 * learned),
        "critic/explained_variance": 0.6 * learned + noise(0.05),
        "loss/value": 0.5 * spread**2,
        "credit/early": 0.8 - 0.3 * learned,
        "credit/late": np.full(steps, 0.95),
    }


def run_of(columns: Mapping[str, Any], given: Mapping[str, Any], state: State | None = None) -> Run:
    count = len(next(iter(columns.values())))
    found = {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}
    return Run(Path("runs/made-up"), given, np.arange(1, count + 1), found, state or State("running"))


Fault = Callable[[Lines], None]
