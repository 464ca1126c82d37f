"""Figures and answers of a run, one JSON object a line, readable while the run goes on."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from keel.errors import CheckpointError, ConfigError
from keel.failpoints import failpoint
from keel.run.folder import storage, write_atomic


class MetricSink(Protocol):
    """Whatever takes the figures of a step."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlMetrics:
    """One line `{"step": 3, "objective/kl": 0.1, ...}` a step; a figure that is not finite becomes null."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raises CheckpointError when the file cannot be written."""
        _append(self._path, [{"step": step, **finite(metrics)}])

    def close(self) -> None:
        """Nothing is held open."""


class TensorBoardMetrics:
    """The same figures as TensorBoard events. `first_step` > 1 hides what an interrupted run wrote from there on."""

    def __init__(self, folder: Path, first_step: int = 1) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("tensorboard is not installed", "log.trackers", "pip install tensorboard") from error
        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class RolloutLog:
    """Answers with their scores, some of every step: `{"step": 3, "prompt": ..., "response": ..., ...}`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def log(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Raises CheckpointError when the file cannot be written."""
        _append(self._path, [{"step": step, **finite(row)} for row in rows])

    def close(self) -> None:
        """Nothing is held open."""


def truncate_after(path: Path, step: int) -> None:
    """Drop the lines of later steps, and a last line cut short by a crash; a resumed run then writes each step once.

    Raises CheckpointError when another line is broken.
    """
    if not path.exists():
        return
    with storage(path):
        whole, _, _torn = path.read_bytes().rpartition(b"\n")
    kept = []
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            keep = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError("not a line of this run", f"{path}:{number}", "repair or remove it") from error
        if keep:
            kept.append(line.decode() + "\n")
    write_atomic(path, "".join(kept))


def sync_to_disk(path: Path) -> None:
    """What was logged survives a power cut from here on; called before a checkpoint that counts on these lines."""
    if path.exists():
        with storage(path), path.open("rb") as file:
            os.fsync(file.fileno())


def _append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    # Opened anew each time: the lines are there for readers at once, and a folder that went away is noticed.
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with storage(path):
        failpoint("log.append")
        with path.open("ab") as file:
            file.write(text.encode())
    failpoint("log.appended")


def finite(value: Any) -> Any:
    """The same with null for what is not finite: JSON has no NaN and no infinity."""
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
