"""pass@k and avg@n of evaluated responses, with intervals over prompts; in `keel evaluate` and during a run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from keel.cli.main import main
from keel.config import EvaluateConfig, TrainConfig, parse
from keel.data.prompts import Prompt
from keel.errors import ConfigError
from keel.evaluation.evaluate import evaluate_policies
from keel.evaluation.judged import EvaluatedResponses
from keel.evaluation.pass_rates import pass_rates

from ..runs import PROMPTS, settings, train


def evaluated(scores: list[list[float]], names: list[str] | None = None) -> EvaluatedResponses:
    names = names or [f"p{row}" for row in range(len(scores))]
    prompts = [Prompt(name, name, (2,), {}) for name in names]
    return EvaluatedResponses(prompts, [["x"] * len(row) for row in scores], {"score": torch.tensor(scores).double()})


def test_rates_by_hand() -> None:
    """Of four responses 1, 0 and 4 are correct: pass@2 is 1/2, 0 and 1; avg@4 is 5/12."""
    metrics = pass_rates(evaluated([[0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]), "score", [2, 1], 1.0)
    assert metrics["pass@2"] == pytest.approx(0.5)
    assert metrics["pass@1"] == metrics["avg@4"] == pytest.approx(5 / 12)
    assert all(
        0 <= metrics[f"{name}_low"] <= metrics[name] <= metrics[f"{name}_high"] <= 1 for name in ("pass@2", "avg@4")
    )


def test_the_threshold_decides() -> None:
    scores = evaluated([[0.4, 0.5, 0.6, 0.7]])
    assert pass_rates(scores, "score", [1], 0.5)["pass@1"] == 0.75
    assert pass_rates(scores, "score", [1], 0.7)["pass@1"] == pytest.approx(0.25)  # 0.7 itself is correct


def test_missing_scores_are_left_out() -> None:
    nan = float("nan")
    metrics = pass_rates(evaluated([[1, 0, nan, nan], [1, 1, 1, 0]]), "score", [1, 3], 1.0)
    assert metrics["avg@4"] == pytest.approx(4 / 6)
    assert metrics["pass@1"] == pytest.approx((0.5 + 0.75) / 2)
    assert metrics["pass@3"] == 1.0  # of the second prompt alone
    assert pass_rates(evaluated([[nan, nan]]), "score", [1], 1.0) == {}
    assert pass_rates(evaluated([[1, 0]]), "rewards/none", [1], 1.0) == {}
    assert pass_rates(evaluated([[1, 0]]), "score", [], 1.0) == {}


def test_intervals_are_those_of_a_bootstrap_over_prompts() -> None:
    draws = np.random.default_rng(0)
    chances = draws.beta(1, 2, size=300)
    scores = (draws.random((300, 8)) < chances[:, None]).astype(float)
    metrics = pass_rates(evaluated(scores.tolist()), "score", [4], 1.0)
    by_prompt = np.array([pass_rates(evaluated([row]), "score", [4], 1.0)["pass@4"] for row in scores.tolist()])
    means = by_prompt[draws.integers(300, size=(4000, 300))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    assert metrics["pass@4_low"] == pytest.approx(low, abs=0.012)
    assert metrics["pass@4_high"] == pytest.approx(high, abs=0.012)


def test_equal_prompts_are_one_cluster() -> None:
    scores = [[1.0, 0.0]] * 10 + [[0.0, 0.0]] * 10
    separate = pass_rates(evaluated(scores), "score", [1], 1.0)
    clustered = pass_rates(evaluated(scores, ["a"] * 10 + ["b"] * 10), "score", [1], 1.0)
    assert separate["pass@1"] == clustered["pass@1"] == 0.25
    assert clustered["pass@1_high"] - clustered["pass@1_low"] > separate["pass@1_high"] - separate["pass@1_low"]


# ---- the commands ----------------------------------------------------------------------------------------------------


def has_w3(completions: list[str], **_: Any) -> list[float]:
    return [float("w3" in text.split()) for text in completions]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return path


def test_an_evaluation_reports_them_with_a_gate_on_them(tiny_policy: Path, prompts: Path) -> None:
    values = {
        "policy": str(tiny_policy),
        "prompts": {"path": str(prompts)},
        "sampling": {"num_responses": 8, "max_response_tokens": 8},
        "pass_at": [1, 8],
        "gate": "pass@8>=0.001, avg@8<=1",
    }
    metrics = evaluate_policies(parse(EvaluateConfig, values), [has_w3])
    policy = metrics["policy"]
    assert policy["avg@8"] == policy["pass@1"] == pytest.approx(policy["score"])
    assert policy["pass@8"] >= policy["pass@1"]
    assert [demand["measured"] for demand in metrics["gate"]["demands"]] == [policy["pass@8"], policy["avg@8"]]


def test_the_table_shows_them(
    tiny_policy: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "f.py").write_text(
        "def f(completions, **_):\n    return [float('w3' in text) for text in completions]\n"
    )
    command = ["evaluate", "--policy", str(tiny_policy), "--prompts.path", str(prompts), "--pass-at", "1,2"]
    assert main([*command, "--sampling.num-responses", "2", "--reward-function", f"{tmp_path / 'f.py'}:f"]) == 0
    shown = capsys.readouterr().out
    assert "pass@2" in shown
    assert "avg@2" in shown


def test_a_run_reports_them_on_held_out_prompts(tiny_policy: Path, prompts: Path, tmp_path: Path) -> None:
    changes = {
        "evaluate.every": 1,
        "evaluate.prompts": str(prompts),
        "evaluate.num_responses": 4,
        "evaluate.pass_at": [1, 4],
        "steps": 1,
    }
    (line,) = train(tiny_policy, tmp_path / "run", changes, [has_w3])
    assert line["evaluate/avg@4"] == line["evaluate/pass@1"] == pytest.approx(line["evaluate/score"])
    assert line["evaluate/pass@4_low"] <= line["evaluate/pass@4"] <= line["evaluate/pass@4_high"]


def test_more_than_there_are_responses_is_refused(tiny_policy: Path, prompts: Path, tmp_path: Path) -> None:
    values = {"policy": "p", "prompts": {"path": "f"}, "pass_at": [4]}
    with pytest.raises(ConfigError, match=r"pass_at: 4 is more than the 1 responses .* raise sampling\.num_responses"):
        parse(EvaluateConfig, values)
    with pytest.raises(ConfigError, match=r"raise evaluate\.num_responses"):
        parse(TrainConfig, settings(tiny_policy, tmp_path, {"evaluate.pass_at": [2]}))
    values = {"policy": str(tiny_policy), "prompts": {"path": str(prompts)}, "pass_at": [1]}
    with pytest.raises(ConfigError, match="pass_at needs a scorer"):
        evaluate_policies(parse(EvaluateConfig, values))
