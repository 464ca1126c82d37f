"""`keel evaluate` at the terminal: the gate's exit code and words, and tables that a person can read."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keel.cli.evaluation import narrow, print_best_of_curve, print_evaluation
from keel.cli.main import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tiny_policy: Path, tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """`keel evaluate` of the tiny policy against the tiny GPT-2 -> exit code, standard output, standard error."""
    (tmp_path / "count.py").write_text(
        "def words(completions, **_):\n    return [len(t.split()) * 1.0 for t in completions]\n"
        "def silent(completions, **_):\n    return [None] * len(completions)\n"
    )
    rows = [{"prompt": f"w{i} w{j}", "kind": "odd" if i % 2 else "even"} for i in range(6) for j in range(5)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def call(*arguments: str) -> tuple[int, str, str]:
        common = ["--policy", str(tiny_policy), "--against", str(tiny_gpt2), "--sampling.max-response-tokens", "5"]
        common += ["--prompts.path", str(tmp_path / "prompts.jsonl")]
        scorers = [f'{{"function": "{tmp_path}/count.py:words"}}']
        scorers += [f'{{"function": "{tmp_path}/count.py:silent", "weight": 0}}']
        code = main(["evaluate", *common, *(x for source in scorers for x in ("--rewards", source)), *arguments])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


def test_a_gate_that_is_met_exits_with_zero(run: Run, tmp_path: Path):
    output = tmp_path / "eval.json"
    code, out, _ = run("--gate", "score>=1, high(length)<=6, prompts>=30", "--output", str(output))
    assert code == 0
    assert "gate: passed, 3 of 3 demands are met" in out
    certificate = json.loads((tmp_path / "eval.gate.json").read_text())
    assert certificate["passed"] is True
    assert certificate["prompts"] == 30
    assert set(certificate["sha256"]) >= {certificate["policy"], str(tmp_path / "prompts.jsonl")}
    assert json.loads(output.read_text())["figures"]["gate"]["passed"] is True


def test_a_gate_that_is_not_met_exits_with_one_and_says_which(run: Run, tmp_path: Path):
    output = tmp_path / "eval.json"
    gate = "score>=4.9, length<=5, slice[odd].score>=4.9"
    code, out, err = run("--gate", gate, "--slices", "kind", "--output", str(output))
    assert code == 1
    assert "the gate is not met: score " in err
    assert err.count("is not >= 4.9") == 2
    assert "gate: NOT PASSED, 1 of 3 demands are met" in out
    assert "win rate" in out  # the figures are shown all the same
    record = json.loads(output.read_text())
    assert [row["passed"] for row in record["figures"]["gate"]["demands"]] == [False, True, False]
    assert json.loads((tmp_path / "eval.gate.json").read_text())["passed"] is False


def test_json_holds_the_verdict_of_a_failed_gate(run: Run):
    code, out, _ = run("--gate", "score>=99", "--json")
    found: dict[str, Any] = json.loads(out)
    assert code == 1
    assert found["gate"]["passed"] is False
    assert found["gate"]["demands"][0]["measured"] == found["policy"]["score"]


def test_a_figure_that_nobody_measured_fails_the_gate(run: Run):
    code, _, err = run("--gate", "rewards/silent>=-1000, people.win_rate>=0")
    assert code == 1
    assert "rewards/silent was not measured; people.win_rate was not measured" in err


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("win_rat>=0.5", "gate: no metric is called 'win_rat'; did you mean win_rate?"),
        ("slice[od].score>=0", "no prompt is in slice[od]; did you mean odd?"),
        ("score>=much", "'much' in 'score>=much' is not a number"),
    ],
)
def test_a_mistake_in_the_gate_costs_nothing(run: Run, gate: str, message: str):
    code, out, err = run("--gate", gate, "--slices", "kind")
    assert code == 2
    assert message in err
    assert "evaluate policy" not in err  # nothing was sampled
    assert out == ""


def test_a_gate_can_be_a_file(run: Run, tmp_path: Path):
    (tmp_path / "release.gate").write_text("# all of these\nscore>=99\nlength<=5\n")
    code, _, err = run("--gate", str(tmp_path / "release.gate"))
    assert code == 1
    assert "is not >= 99" in err


def test_slices_and_best_of_n_are_shown(run: Run):
    code, out, _ = run("--slices", "kind", "--best-of", "4", "--sampling.num-responses", "4")
    assert code == 0
    assert "by kind" in out
    assert "fewer than 20 prompts, so hardly informative: even 15, odd 15" in out
    assert "best of n responses of against, chosen by the score" in out
    assert "by the score, a response of policy is worth" in out
    assert all(len(line) <= 100 for line in out.splitlines() if "│" in line)


def test_prompts_that_are_no_part_of_a_best_of_n_are_counted(capsys: pytest.CaptureFixture[str]):
    policy = {name: 1.0 for part in ("score", "length", "kl") for name in (part, f"{part}_low", f"{part}_high")}
    figures = {"prompts": 30, "policy": policy | {"worth_best_of": None}}
    print_best_of_curve("against", [{"n": 1, "prompts": 28, "kl_bound": 0.0, **policy}], figures)
    assert capsys.readouterr().out.startswith(
        "best of n responses of against: 2 prompts are left out, because a response has no score\n"
    )
    print_best_of_curve("against", [], figures)
    assert capsys.readouterr().out == (
        "best of n responses of against: 30 prompts are left out, because a response has no score\n"
    )


def test_pairs_say_what_comes_next(run: Run, tmp_path: Path):
    pairs = str(tmp_path / "pairs.jsonl")
    code, out, _ = run("--pairs", pairs)
    assert code == 0
    assert f"next: keel rank {pairs} --mode pairs --store {tmp_path}/pairs.db" in out
    assert "(not for raters)" in out
    code, _, err = run("--pairs", pairs)
    assert code == 2
    assert "already exists -> name another file, or pass its rankings with --judgements" in err


@pytest.mark.parametrize(
    ("ends", "shown"),
    [
        ((1.925, 1.875, 1.975), "1.93 ±0.05"),
        ((23.4, 20.0, 27.0), "23 ±4"),
        ((123.4, 100.0, 150.0), "123 ±25"),
        ((0.0, 0.0, 0.0243), "0 to 0.024"),
        ((1.0, 0.83, 1.0), "0.83 to 1"),
        ((7.0, 7.0, 7.0), "7"),
    ],
)
def test_a_narrow_cell_has_the_digits_that_its_interval_bears(ends: tuple[float, float, float], shown: str):
    value, low, high = ends
    assert narrow({"x": value, "x_low": low, "x_high": high}, "x") == shown
    assert narrow({}, "x") == ""


def test_an_empty_gate_asks_for_nothing_and_is_refused(run: Run):
    code, _, err = run("--gate", "")
    assert code == 2
    assert err.startswith("keel: error: gate: ")
    assert err.count("\n") == 1


def test_a_rate_that_is_not_identified_is_named_with_the_reason(capsys: pytest.CaptureFixture[str]):
    nan = math.nan
    rate = {f"length_controlled_win_rate{end}": nan for end in ("", "_low", "_high")}
    wins = {"win_rate": 0.6, "win_rate_low": 0.5, "win_rate_high": 0.7}
    policy = {"length": 9.0, "length_low": -math.inf, "length_high": math.inf, "truncated": 0.0}
    counts = {"prompts": 40, "rows": 44, "responses_per_prompt": 1}
    print_evaluation({**counts, "policy": policy, "against": policy, **wins, **rate, "length_overlap": 0.025})
    shown = capsys.readouterr().out
    assert "40 prompts in 44 rows" in shown
    assert "LC win rate is not identified: one side is longer in 97.5% of the comparisons" in shown
    assert narrow(policy, "length") == "9"
