"""Healthy runs with metrics of random responses, to test the effect of chance: few prompts, groups, coarse scores.

A response has a hidden quality, which the policy improves. Scorers measure it with noise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keel.run.read.run import Run

from .runs import run_of, settings

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Task:
    """The score of a response by its quality, and the rise of the quality over the run, in its initial deviations."""

    pay: Callable[[Floats], Floats]
    gain: float
    narrows: float = 0.6  # of the quality's deviation remains at the end


def passes(bound: float) -> Callable[[Floats], Floats]:
    return lambda quality: (quality > bound).astype(float)


TASKS = {
    "smooth": Task(lambda quality: quality, 1.5),
    "large": Task(lambda quality: 1000 * quality - 3000, 1.5),
    "yes or no": Task(passes(0.3), 1.2, narrows=0.9),
    "sparse": Task(passes(2.0), 2.0, narrows=1.0),
    "sparse, then solved": Task(passes(2.0), 4.0, narrows=0.5),
    "good, then better": Task(passes(-1.7), 1.5, narrows=0.7),
    "mistakes": Task(lambda quality: -np.floor(np.maximum(0, 3 - 1.5 * quality)), 1.5),
    "solved": Task(passes(-0.5), 3.0, narrows=0.5),
    "levels": Task(lambda quality: np.clip(np.round(quality), -2, 2) / 2, 1.5),
}


@dataclass(frozen=True)
class Shape:
    batch: int
    group: int = 1
    steps: int = 60
    length: float = 40.0
    alike: float = 0.5  # share of the quality's variance that comes from the prompt


def simulated(task: Task, shape: Shape, seed: int) -> Run:
    """Return a run of RLOO if there are groups, else of PPO."""
    random = np.random.default_rng(seed)
    rows = [_step(task, shape, place / (shape.steps - 1), random) for place in range(shape.steps)]
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    given = settings(
        shape.steps,
        rewards=[
            {"function": "a.py:train"},
            {"function": "b.py:judge", "weight": 0.0},
            {"function": "c.py:other", "weight": 0.0},
        ],
        algorithm__name="ppo" if shape.group == 1 else "rloo",
        algorithm__kl_coef=0.05 * float(columns["objective/scores_std"].max()),
        rollout__batch_size=shape.batch,
        rollout__group_size=shape.group,
        rollout__max_response_tokens=int(4 * shape.length),
    )
    columns["objective/kl_coef"] = np.full(shape.steps, given["algorithm"]["kl_coef"])
    columns["objective/non_score_reward"] = -columns["objective/kl_coef"] * columns["objective/kl"]
    return run_of(columns, given)


def _step(task: Task, shape: Shape, done: float, random: np.random.Generator) -> dict[str, Any]:
    learned = 1 - np.exp(-4 * done)
    prompts = shape.batch // shape.group
    deviation = 1 - (1 - task.narrows) * learned
    of_prompt = np.repeat(random.standard_normal(prompts), shape.group) * shape.alike**0.5
    quality = deviation * (of_prompt + (1 - shape.alike) ** 0.5 * random.standard_normal(shape.batch))
    quality += task.gain * learned
    scores = task.pay(quality)
    held_out = {name: quality + random.standard_normal(shape.batch) for name in ("judge", "other")}
    lengths = np.maximum(1, shape.length * (1 - 0.2 * learned + 0.25 * random.standard_normal(shape.batch)))
    divergence = 5 * learned**2
    kl = divergence + np.sqrt(2 * divergence + 1e-12) * random.standard_normal(shape.batch)
    foreseen = 0.6 * learned * (scores - scores.mean())
    low, median, high = np.quantile(scores, [0.1, 0.5, 0.9])
    groups = scores.reshape(prompts, shape.group)
    moved = 0.02 * (1 - 0.9 * done) * np.exp(0.7 * random.standard_normal())
    row = {
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(),
        "objective/scores_low": low,
        "objective/scores_median": median,
        "objective/scores_high": high,
        "objective/shaped_scores": scores.mean(),
        "objective/shaped_scores_std": scores.std(),
        "objective/kl": kl.mean(),
        "objective/reference_logprob": -0.55 + 0.1 * learned + 0.1 * random.standard_normal() / shape.batch**0.5,
        "response/length": lengths.mean(),
        "response/length_std": lengths.std(),
        "response/length_correlation": _correlation(_ranks(scores), _ranks(lengths)),
        "response/truncated": (random.random(shape.batch) < 0.01).mean(),
        "response/distinct": 1.0,
        "response/repetition": abs(0.01 * random.standard_normal() / shape.batch**0.5),
        "prompts/distinct": prompts / shape.batch,
        "reward/dropped": 0.0,
        "update/skipped": 0.0,
        "sampler/approx_kl": 1e-8,
        "policy/learning_rate": 3e-4 * (1 - done),
        "policy/entropy": 0.55 - 0.2 * learned + 0.1 * random.standard_normal() / shape.batch**0.5,
        "policy/approx_kl": moved / 2,
        "policy/step_kl": moved,
        "policy/clipfrac": 0.05,
        "policy/grad_norm": 0.4,
    }
    for name, judged in held_out.items():
        row |= {f"rewards/{name}": judged.mean(), f"spread/{name}": judged.std()}
        row[f"agreement/{name}"] = _correlation(_ranks(scores), _ranks(judged))
    if shape.group > 1:
        return row | {"groups/equal_scores": (groups == groups[:, :1]).all(1).mean()}
    left = (scores - scores.mean() - foreseen).std()
    explained = 1 - (left / scores.std()) ** 2 if scores.std() > 0 else np.nan
    return row | {
        "critic/values": scores.mean() - 0.3 * np.exp(-8 * done) * scores.std(),
        "critic/returns": scores.mean(),
        "critic/returns_std": scores.std(),
        "critic/advantages_std": left,
        "critic/explained_variance": explained,
        "loss/value": left**2 / 2,
        "credit/early": 0.6,
        "credit/late": 0.9,
    }


def _ranks(x: Floats) -> Floats:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return np.asarray((counts.cumsum() - (counts - 1) / 2)[inverse])


def _correlation(x: Floats, y: Floats) -> float:
    return float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else np.nan
