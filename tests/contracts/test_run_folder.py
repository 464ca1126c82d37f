"""Answers, checkpoints, verdicts and reports of a run: what one part of keel writes another reads."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keel.cli.main import main
from keel.config import RewardConfig, TrainConfig, parse
from keel.errors import ConfigError
from keel.evaluation.frontier import find_checkpoints, settings_of_run
from keel.report.responses import BY_TOKEN, token_rows
from keel.report.run_report import write_report
from keel.run.checkpoint import latest_checkpoint
from keel.run.folder import RunFolder
from keel.run.read.responses import ResponseLog
from keel.run.read.run import read_state
from keel.run.reward_files import RANGE, read_range, require_gate_pass

from ..runs import lines, without_clock
from .conftest import LEARNING, STEPS, Runs


@pytest.mark.parametrize("name", LEARNING)
def test_answers(name: str, runs: Runs) -> None:
    """The index of rollouts.jsonl finds in each line what the trainer put there, and texts of others in none."""
    path = runs.path(name) / "rollouts.jsonl"
    written, answers = lines(path), ResponseLog(path)
    answers.refresh()
    assert len(answers) == len(written) == 4 * STEPS
    for figure in ("step", "score", "kl", "length", "truncated"):
        assert getattr(answers, figure).tolist() == [row[figure] for row in written]
    assert set(answers.scores) == set(runs.run(name).scorer_weights())
    for scorer, values in answers.scores.items():
        said = [row["scores"][scorer] for row in written]
        np.testing.assert_array_equal(values, np.array(said, dtype=float))
    texts = list(answers.texts(range(len(written))))
    assert [(prompt, response) for _, prompt, response in texts] == [(r["prompt"], r["response"]) for r in written]
    assert answers.rows([0, 5]) == [written[0], written[5]]
    assert all(row["logged"].keys() == {"prompt"} for row in written)  # a name that the index must not fall for


@pytest.mark.parametrize("name", LEARNING)
def test_figures_of_tokens(name: str, runs: Runs) -> None:
    path = runs.path(name) / "rollouts.jsonl"
    for row in lines(path):
        assert {figure: len(row[figure]) for figure in BY_TOKEN} == dict.fromkeys(BY_TOKEN, row["length"])
    answers = ResponseLog(path)
    answers.refresh()
    assert token_rows(answers)


def supervised_step(text: str) -> int:
    return max(json.loads(line)["step"] for line in text.splitlines())


@pytest.mark.parametrize("name", [*LEARNING, "sft", "reward", "dpo"])
def test_checkpoints(name: str, runs: Runs) -> None:
    """A run that goes on from its first checkpoint ends as the run that was left alone."""
    length = {"steps": STEPS} if name in LEARNING else {"epochs": 2}
    half = {key: value // 2 for key, value in length.items()}
    for output, size in (("straight", length), ("halves", half)):
        assert main(runs.command(name, f"{name}-{output}", **size)) == 0
    folder = runs.folder / f"{name}-halves"
    saved = latest_checkpoint(RunFolder(folder))
    assert saved is not None
    assert saved.step == supervised_step((folder / "metrics.jsonl").read_text())
    assert main([*runs.command(name, f"{name}-halves", **length), "--resume"]) == 0
    straight = lines(runs.folder / f"{name}-straight" / "metrics.jsonl")
    assert figures_of(straight) == figures_of(lines(folder / "metrics.jsonl"))


def figures_of(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the clock, and without what is measured at the end of a run."""
    lines = without_clock(metrics)
    left_out = ("/eval_", "/tokens_per_second")
    return [{key: value for key, value in line.items() if not any(part in key for part in left_out)} for line in lines]


@pytest.mark.parametrize("name", LEARNING)
def test_settings(name: str, runs: Runs) -> None:
    """config.yaml is what keel evaluate and keel drift take the run's scorers and settings from."""
    path = str(runs.path(name))
    config = settings_of_run(path)
    assert config == parse(TrainConfig, config.model_dump(mode="json"))
    assert [source.name for source in config.rewards] == list(runs.run(name).scorer_weights())
    assert list(find_checkpoints(path)) == [0, 2, STEPS]


@pytest.mark.parametrize("name", [*LEARNING, "sft", "reward", "dpo"])
def test_how_a_run_stands(name: str, runs: Runs) -> None:
    assert read_state(RunFolder(runs.path(name))).standing == "finished"
    assert runs.run(name).stage == (name if name in ("sft", "reward", "dpo") else "train")


@pytest.mark.parametrize("name", ["reward", "ensemble"])
def test_the_verdict_and_the_range_travel_with_a_reward_model(name: str, runs: Runs, tmp_path: Path) -> None:
    model = runs.path(name) / "model"
    require_gate_pass(str(model))
    known = read_range(str(model))
    assert known is not None
    assert known.keys() == set(RANGE)
    assert known["score_lowest"] <= known["score_median"] <= known["score_highest"]


def test_a_gate_that_failed_is_read_as_failed(runs: Runs) -> None:
    assert main(runs.command("reward", "reward-failed", gate="accuracy=1,loss=0")) == 1
    with pytest.raises(ConfigError, match="failed its gate"):
        require_gate_pass(str(runs.folder / "reward-failed" / "model"))
    shutil.rmtree(runs.folder / "reward-failed")


def test_reports_are_written_of_every_kind_of_run(runs: Runs, tmp_path: Path) -> None:
    names = [*LEARNING, "sft", "reward", "dpo"]
    for name in names:
        page, verdicts = write_report([str(runs.path(name))], str(tmp_path / f"{name}.html"))
        assert list(verdicts) == [str(runs.path(name))]
        assert page.read_text(encoding="utf-8").count("<html") == 1
    together, verdicts = write_report([str(runs.path(name)) for name in names], str(tmp_path / "all.html"))
    assert len(verdicts) == len(names)
    assert "score_2" in together.read_text(encoding="utf-8")


def test_settings_of_a_reward_model(runs: Runs) -> None:
    saved = RunFolder(runs.path("reward")).settings()
    assert parse(RewardConfig, saved).model_dump(mode="json") == saved
