"""The doctor while a run goes on: what it says, when it stops a run, and that it changes nothing else."""

from pathlib import Path
from typing import Any

import pytest

from keel.errors import Halted
from keel.training.watch import _say

from ..runs import contents, lines, train


def same(completions: list[str], **_: Any) -> list[float]:
    """A reward that tells nothing apart."""
    return [1.0] * len(completions)


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("keel: doctor:")]


CONSTANT = {"steps": 6, "rollout.batch_size": 96, "algorithm.kl_coef": 0.0}


def test_a_finding_is_said_once_when_it_opens(tiny_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train(tiny_policy, tmp_path / "run", CONSTANT, scorers=(same,))
    said = [line for line in told(capsys) if "no-signal" in line]
    assert said == [
        "keel: doctor: critical: no-signal since step 1: Responses get equal scores, so there is nothing to learn "
        "from. -> try rewards: a scorer that distinguishes these responses; try it on two responses by hand"
    ]


def test_quiet_says_nothing(tiny_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train(tiny_policy, tmp_path / "run", CONSTANT | {"doctor": "quiet"}, scorers=(same,))
    assert told(capsys) == []


def test_stop_ends_the_run_with_a_checkpoint_and_it_can_go_on(
    tiny_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(Halted) as error:
        train(tiny_policy, tmp_path / "run", CONSTANT | {"doctor": "stop"}, scorers=(same,))
    assert error.value.exit_code == 3
    assert error.value.what.startswith("no-signal since step 1")
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 5
    assert (tmp_path / "run" / "checkpoints" / "step-000005").is_dir()
    told(capsys)
    train(tiny_policy, tmp_path / "run", CONSTANT | {"doctor": "tell"}, scorers=(same,), resume=True)
    said = [line for line in told(capsys) if "no-signal" in line]
    assert said == ["keel: doctor: still open since step 1: critical no-signal"], "in full it was said before"
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 6


def test_being_watched_changes_nothing(tiny_policy: Path, tmp_path: Path):
    for mode in ("quiet", "tell"):
        train(tiny_policy, tmp_path / mode, {"steps": 3, "doctor": mode})
    ours, theirs = (contents(tmp_path / mode) for mode in ("quiet", "tell"))
    assert ours == theirs


def test_what_a_run_says_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]):
    _say("warning: \x1b[2Jgone\x07 since step 3\n\u202eretsambew")
    assert capsys.readouterr().err == "keel: doctor: warning: \\x1b[2Jgone\\x07 since step 3\\n\\u202eretsambew\n"
