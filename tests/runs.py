"""A small run of `keel.train`, which each test changes by a few settings."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keel

PROMPTS = ["w1 w2", "w5", "w6 w7 w8", "w9"]


def share_of_w3(completions: list[str], **_: Any) -> list[float]:
    """An easy reward: how much of the answer is the word w3."""
    return [words.count("w3") / max(1, len(words)) for words in map(str.split, completions)]


def settings(model: Path, output: Path, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The base run (16 answers of up to 6 tokens a step, two steps) with `changes` by dotted names."""
    values: dict[str, Any] = {
        "output": str(output),
        "steps": 2,
        "policy": {"model": str(model)},
        "prompts": {"path": "given.jsonl"},
        "rollout": {"batch_size": 16, "max_response_tokens": 6},
        "algorithm": {"kl_coef": 0.05, "update_epochs": 1},
        "optim": {"learning_rate": 2e-3, "schedule": "constant"},
        "checkpoint": {"every": 0},
    }
    for name, value in (changes or {}).items():
        section, _, key = name.rpartition(".")
        (values.setdefault(section, {}) if section else values)[key] = value
    return values


def train(
    model: Path,
    output: Path,
    changes: Mapping[str, Any] | None = None,
    scorers: Sequence[Callable[..., Any]] = (share_of_w3,),
    prompts: Sequence[Any] | None = PROMPTS,
    resume: bool = False,
) -> list[dict[str, Any]]:
    """Run `keel.train`; the lines of its metrics file."""
    keel.train(settings(model, output, changes), scorers, prompts, resume=resume)
    return lines(output / "metrics.jsonl")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_clock(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What two runs of the same settings must agree in."""
    return [{key: value for key, value in line.items() if not key.startswith(("time/", "perf/"))} for line in metrics]


def contents(folder: Path) -> dict[str, bytes]:
    """All files that hold weights, moments, counters or answers. (config.yaml names the folder itself.)"""
    kinds = (".safetensors", "state.json", "rollouts.jsonl", "tokenizer.json")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name.endswith(kinds)
    }
