"""A small run folder, written by hand, so that every number in a report of it can be checked by eye."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from keel.config import TrainConfig, parse

COLUMNS: dict[str, list[float | None]] = {
    "objective/scores": [0.0, 0.5, 1.0, 1.25, 1.5, 1.5],
    "rewards/judge": [0.0, 0.5, 1.0, 1.25, 1.5, 1.5],  # equal to the scores
    "rewards/gold": [0.0, 1.0, 2.0, 2.0, -2.0, -6.0],
    "objective/kl": [0.0, 1.0, 2.0, 4.0, 6.0, 9.0],
    "objective/kl_coef": [0.05, 0.05, 0.05, 0.05, 0.05, 0.05],
    "response/length": [20.0, 20.0, 18.0, 16.0, 12.0, 10.0],
    "policy/entropy": [1.0, None, 0.75, 0.5, 0.25, 0.125],
    "evaluate/score": [None, None, 0.75, None, None, 1.25],
    "evaluate/kl": [None, None, 2.0, None, None, 9.0],
    "my/figure": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
}
BEGAN = {"inputs": {"base": "ab" * 32}, "machine": {"device": "abacus", "keel": "0.1.0"}}


def settings(**changes: Any) -> dict[str, Any]:
    """Return all settings of a run as it saves them; `changes` are dotted names with __ for the dot."""
    values: dict[str, Any] = {
        "output": "runs/small",
        "steps": 6,
        "policy": {"model": "base"},
        "prompts": {"path": "prompts.jsonl"},
        "rewards": [{"model": "judge/model"}, {"function": "judge.py:gold", "weight": 0.0}],
    }
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (values.setdefault(section, {}) if section else values)[key] = value
    return parse(TrainConfig, values).model_dump(mode="json")


def answer(step: int, prompt: Any, response: str, score: float | None, kl: float = 1.0, **more: Any) -> dict[str, Any]:
    """Return a row of rollouts.jsonl with two tokens."""
    return {
        "step": step,
        "score": score,
        "kl": kl,
        "length": len(response.split()),
        "truncated": False,
        "scores": {"model": score},
        "prompt": prompt,
        "response": response,
        "tokens": [5, 6],
        "pieces": [response[:3], response[3:]],
        "logprobs": [-0.5, -1.0],
        "ref_logprobs": [-1.0, -1.0],
        "values": [0.25, 0.5],
        "rewards": [-0.025, 1.0],
        "advantages": [0.5, -0.75],
        **more,
    }


ANSWERS = [
    answer(1, "Where is my drill?", " who knows.", -2.0, kl=0.0),
    answer(1, "Thank you!", " bye.", 1.0, kl=0.5),
    answer(3, "Thank you!", " have a nice day.", 0.5, kl=2.0),
    answer(6, "Where is my drill?", " I will look. who knows.", 3.0, kl=8.0),
    answer(6, "Thank you!", " have a good day.", 0.75, kl=4.0),
]


def write_run(
    path: Path,
    given: Mapping[str, Any] | None = None,
    columns: Mapping[str, Sequence[Any]] = COLUMNS,
    answers: Sequence[Mapping[str, Any]] = ANSWERS,
    began: Mapping[str, Any] | None = BEGAN,
) -> Path:
    """Write the folder of a finished run."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(dict(given or settings()), sort_keys=False))
    steps = max((len(values) for values in columns.values()), default=0)
    lines = [{"step": step + 1} | {name: values[step] for name, values in columns.items()} for step in range(steps)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if answers:
        (path / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    if began is not None:
        (path / "began.json").write_text(json.dumps(began))
    (path / "ended.json").write_text('{"standing": "finished", "what": ""}\n')
    return path
