"""The logs: a line a step, valid JSON always, no step twice and none missing after a resume."""

import errno
import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from keel.errors import CheckpointError
from keel.run.metrics import JsonlMetrics, RolloutLog, TensorBoardMetrics, truncate_after


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


@pytest.mark.parametrize("torn", range(1, 14))
def test_a_torn_last_line_is_dropped_and_logging_goes_on(tmp_path: Path, torn: int):
    path = tmp_path / "metrics.jsonl"
    line = '{"step": 2, "é": 1}\n'.encode()
    path.write_bytes(b'{"step": 1}\n' + line[:-torn])
    truncate_after(path, 2)
    metrics = JsonlMetrics(path)
    metrics.log(2, {})
    assert steps(path) == [1, 2]


def test_a_broken_line_elsewhere_is_named(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
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
