"""docs/metrics.md has a row for every key that a run writes, and no other."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keel.config import DpoConfig, RewardConfig, SftConfig, parse
from keel.supervised.dpo import dpo
from keel.supervised.reward import reward
from keel.supervised.sft import sft
from keel.training.policy import train_policy

from ..runs import PROMPTS, lines, settings, share_of_w3, train

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"


def documented() -> set[str]:
    """The keys in the first column of the tables."""
    rows = [line.split("|")[1] for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    return {key for row in rows for key in re.findall(r"`([^`]+/[^`]+)`", row)}


RESAMPLING = ("resample/", "time/resample_seconds")


def written(metrics: list[dict[str, Any]]) -> set[str]:
    names = {name for line in metrics for name in line if name != "step"}
    names = {re.sub(r"pass@\d+(_low|_high)?", "pass@K", name) for name in names}  # one row for value and interval
    names = {re.sub(r"avg@\d+(_low|_high)?", "avg@N", name) for name in names}
    return {re.sub("share_of_w3|words", "NAME", name) for name in names}


def words(completions: list[str], log_metric: Callable[[str, float], None], **_: Any) -> list[float]:
    """A second scorer, which logs something."""
    log_metric("words", 1.0)
    return [float(len(text.split())) for text in completions]


def keys_of(*prefixes: str) -> set[str]:
    return {key for key in documented() if key.startswith(prefixes)}


def test_policy_learning(tiny_policy: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "w11"}\n')
    with_all = {
        "algorithm.kl_in": "loss",
        "rollout.group_size": 2,
        "evaluate.every": 1,
        "evaluate.prompts": str(held_out),
        "evaluate.num_responses": 2,
        "evaluate.pass_at": [2],
        "steps": 1,
    }
    keys = written(train(tiny_policy, tmp_path / "run", with_all, scorers=(share_of_w3, words)))
    models = ("outside_range/", "disagreement/", "evaluate/disagreement/", "cut/", "evaluate/cut/")
    models += ("judge_", "evaluate/judge_")  # tests/judge/test_judge_scorer.py
    assert keys == documented() - keys_of("sft/", "dpo/", "check/", *RESAMPLING, *models) - {
        key for key in keys_of("reward/") if key != "reward/dropped"
    }


def test_resampling(tiny_policy: Path, tmp_path: Path) -> None:
    changes = {"algorithm.name": "grpo", "rollout.group_size": 2, "rollout.resample_rounds": 1, "steps": 1}
    found = {name for name in written(train(tiny_policy, tmp_path / "run", changes)) if name.startswith(RESAMPLING)}
    assert found == keys_of(*RESAMPLING)


def test_labels(tiny_policy: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"w{i}", "completion": " w1 w2", "label": i % 2 == 0} for i in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(data), "eval_fraction": 0.5}
    values = {"output": str(tmp_path / "run"), "model": str(tiny_policy), "data": source, "patience": 1, "loss": "kto"}
    dpo(parse(DpoConfig, values))
    comparisons = {"dpo/length_accuracy", "dpo/length_sign", "dpo/rankings_left_out"}
    assert written(lines(tmp_path / "run" / "metrics.jsonl")) == keys_of("dpo/") - comparisons


def test_the_check(tiny_policy: Path, tmp_path: Path) -> None:
    measured = train_policy(settings(tiny_policy, tmp_path), [share_of_w3], PROMPTS, check_only=True)
    assert set(measured) == keys_of("check/") - keys_of("check/engine_")


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_supervised_stages(stage: str, tiny_policy: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"w{i}", "completion": " w1 w2"} for i in range(8)]
    if stage == "reward":
        rows = [{"prompt": f"w{i}", "chosen": " w1 w2", "rejected": f" w{i}"} for i in range(8)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(data), "eval_fraction": 0.5}
    values = {"output": str(tmp_path / "run"), "model": str(tiny_policy), "data": source, "patience": 1}
    if stage == "sft":
        sft(parse(SftConfig, values))
    else:
        reward(parse(RewardConfig, values))
    assert written(lines(tmp_path / "run" / "metrics.jsonl")) == keys_of(f"{stage}/") - {"reward/dropped"}


def test_the_answers_log(tiny_policy: Path, tmp_path: Path) -> None:
    train(tiny_policy, tmp_path / "run", {"steps": 1})
    text = DOCUMENT.read_text().partition("## rollouts.jsonl")[2]
    (answer, *_) = lines(tmp_path / "run" / "rollouts.jsonl")
    assert set(answer) == set(re.findall(r"`(\w+)`", text))
