"""The logs: a line a step, valid JSON always, no step twice and none missing after a resume."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from keel.errors import CheckpointError
from keel.run.metrics_log import JsonlMetrics, TensorBoardMetrics, truncate_after
from keel.run.rollout_log import RolloutLog


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_can_be_read_while_the_run_goes_on(tmp_path: Path):
    metrics = JsonlMetrics(tmp_path / "metrics.jsonl")
    metrics.log(1, {"objective/kl": 0.5})
    metrics.log(2, {"objective/kl": float("nan"), "objective/scores": float("-inf")})
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [
        '{"step": 1, "objective/kl": 0.5}',
        '{"step": 2, "objective/kl": null, "objective/scores": null}',
    ]


def test_rollouts_of_a_step(tmp_path: Path):
    log = RolloutLog(tmp_path / "rollouts.jsonl")
    log.log(4, [{"prompt": "é\u2028", "score": float("inf")}, {"prompt": "b", "segment_scores": [1.0, float("nan")]}])
    rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().split("\n")[:-1]]
    assert rows == [
        {"step": 4, "prompt": "é\u2028", "score": None},
        {"step": 4, "prompt": "b", "segment_scores": [1.0, None]},
    ]


def test_truncate_after(tmp_path: Path):
    path = tmp_path / "rollouts.jsonl"
    log = RolloutLog(path)
    for step in (1, 1, 2, 3, 3, 4):
        log.log(step, [{"prompt": "one\u2028two"}])
    truncate_after(path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().split("\n")[:-1]] == [1, 1, 2, 3, 3]
    truncate_after(path, 0)
    assert path.read_text() == ""
    truncate_after(path, 0)
    truncate_after(tmp_path / "none.jsonl", 3)


@pytest.mark.parametrize("torn", range(2, 14))
def test_a_torn_last_line_is_dropped_and_logging_goes_on(tmp_path: Path, torn: int):
    path = tmp_path / "metrics.jsonl"
    line = '{"step": 2, "é": 1}\n'.encode()
    path.write_bytes(b'{"step": 1}\n' + line[:-torn])
    truncate_after(path, 2)
    metrics = JsonlMetrics(path)
    metrics.log(2, {})
    assert steps(path) == [1, 2]


LOG = [{"step": step, "row": row, "rows": 2, "prompt": "p"} for step in range(1, 7) for row in range(2)]
EDITS: dict[str, tuple[Callable[[list[str]], str], str]] = {
    "untouched": ("".join, ""),
    "no newline at the end": (lambda log: "".join(log)[:-1], ""),
    "torn at the end": (lambda log: "".join(log)[:-9], "lines of step 6 are missing"),
    "zeros at the end": (lambda log: "".join(log[:-2]) + "\0" * 80, "lines of step 6 are missing"),
    "a row gone": (lambda log: "".join(log[:3] + log[4:]), "lines of step 2 are missing"),
    "steps gone": (lambda log: "".join(log[:2] + log[4:6] + log[10:]), "lines of steps 2, 4 to 5 are missing"),
    "an older copy": (lambda log: "".join(log[:4]), "lines of steps 3 to 6 are missing"),
    "empty": (lambda log: "", "lines of steps 1 to 6 are missing"),
    "a row doubled": (lambda log: "".join(log[:3] + log[2:]), "step 2 occur more than once"),
    "doubled": (lambda log: "".join(log * 2), "steps 1 to 6 occur more than once"),
    "in another order": (lambda log: "".join(reversed(log)), ""),
    "doubled for lost": (lambda log: "".join(log[:4] + log[2:4] + log[6:]), "lines of step 3 are missing"),
}


@pytest.mark.parametrize("edit", list(EDITS))
def test_what_a_log_lost_or_has_twice_is_reported(edit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Whatever happened to the file, each line that is left stands in it once and in order."""
    path = tmp_path / "rollouts.jsonl"
    change, said = EDITS[edit]
    whole = [json.dumps(row) + "\n" for row in LOG]
    path.write_text(change(whole))
    truncate_after(path, 6, first=1)
    left = path.read_text()
    assert left.splitlines(keepends=True) == [line for line in whole if line in left]
    words = capsys.readouterr().err
    assert said in words
    assert bool(words) == bool(said)
    truncate_after(path, 3, first=1)
    assert set(steps(path)) <= {1, 2, 3}


def test_a_log_that_is_gone_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    truncate_after(tmp_path / "metrics.jsonl", 4, first=0)
    assert "lines of steps 0 to 4 are missing" in capsys.readouterr().err
    truncate_after(tmp_path / "metrics.jsonl", -1, first=0)
    assert capsys.readouterr().err == ""


def test_a_step_logged_twice_is_the_last(tmp_path: Path):
    """As readers of the file have it."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 1, "a": 3}\n')
    truncate_after(path, 2, first=1)
    assert path.read_text() == '{"step": 1, "a": 3}\n{"step": 2, "a": 2}\n'


@pytest.mark.parametrize("line", ['{"st', "", "[]", '{"step": "2"}', '{"step": 2.5}', '{"step": true}', "[" * 99_999])
def test_a_broken_line_elsewhere_is_named(tmp_path: Path, line: str):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(CheckpointError, match=r"metrics.jsonl:2: not a line of this run"):
        truncate_after(path, 3)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device /dev/full")
def test_a_full_disk_is_named():
    metrics = JsonlMetrics(Path("/dev/full"))
    with pytest.raises(CheckpointError, match=r"/dev/full: No space left on device"):
        metrics.log(1, {"a": 1.0})


def test_tensorboard(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardMetrics(tmp_path)
    for step in (1, 2):
        sink.log(step, {"objective/kl": step / 2})
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("objective/kl")] == [(1, 0.5), (2, 1.0)]


class Failing:
    """The calls into the file system that writing a log takes, of which the nth fails; a write, when half is done."""

    def __init__(self, at: int) -> None:
        self.left = at

    def due(self) -> bool:
        self.left -= 1
        return self.left == 0

    def call(self, real: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if self.due():
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **options)

        return wrapped

    def open(self, real: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            file = self.call(real)(*arguments, **options)
            write = file.write

            def half(data: Any) -> int:
                if not self.due():
                    return int(write(data))
                write(data[: len(data) // 2])
                file.flush()
                raise OSError(errno.ENOSPC, "No space left on device")

            wrapper = MagicMock(wraps=file)
            wrapper.write, wrapper.__enter__.return_value = half, wrapper
            wrapper.__exit__.side_effect = lambda *_: file.close()
            return wrapper

        return wrapped


def test_every_call_of_a_log_may_fail(tmp_path: Path):
    """Whatever fails, what was logged before is there, and after cutting the log back each step stands in it once."""
    failed = 0
    for at in range(1, 30):
        path = tmp_path / f"{at}.jsonl"
        JsonlMetrics(path).log(1, {"a": 1.0})
        failing = Failing(at)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "open", failing.open(Path.open))
            patch.setattr(Path, "replace", failing.call(Path.replace))
            patch.setattr(os, "fsync", failing.call(os.fsync))
            try:
                JsonlMetrics(path).log(2, {"a": 2.0})
                truncate_after(path, 1)
            except CheckpointError:
                failed += 1
        truncate_after(path, 1)
        JsonlMetrics(path).log(2, {"a": 2.0})
        assert steps(path) == [1, 2]
    assert failed >= 5
    assert failing.left > 0, "the last tries met no failure"
