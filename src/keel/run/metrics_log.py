"""Metrics of a run, one JSON object a line, readable during the run."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from keel.errors import CheckpointError, ConfigError
from keel.failpoints import failpoint
from keel.files import read_regular
from keel.run.folder import RunFolder, storage, write_atomic
from keel.run.json_values import finite
from keel.terminal import tell

SHOWN = 8  # places of a log that are named in a line


class MetricSink(Protocol):
    """Whatever takes the figures of a step."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlMetrics:
    """One line `{"step": 3, "objective/kl": 0.1, ...}` a step; a figure that is not finite becomes null."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step. Raises CheckpointError when the file cannot be written."""
        line = json.dumps({"step": step, **finite(metrics)}, ensure_ascii=False, allow_nan=False)
        append_lines(self._path, [line + "\n"])

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


@contextmanager
def open_sinks(folder: RunFolder, trackers: Sequence[str], done: int, first: int) -> Iterator[list[MetricSink]]:
    """Open the run's metrics for appending, and close them at the end of the block.

    The file is cut back to the steps up to `done`; `first` is the step of its first line. Raises CheckpointError for a
    broken line, ConfigError for a tracker that is not installed.
    """
    truncate_after(folder.metrics, done, first)
    sinks: list[MetricSink] = [JsonlMetrics(folder.metrics)]
    if "tensorboard" in trackers:
        sinks.append(TensorBoardMetrics(folder.tensorboard, done + 1))
    with ExitStack() as stack:
        for sink in sinks:
            stack.callback(sink.close)
        yield sinks


def truncate_after(path: Path, step: int, first: int | None = None) -> None:
    """Cut a log back to the steps up to `step`, from which a run continues: each line once, in the order of the steps.

    Drops the lines of later steps and a last line that a crash cut short. Lines that stand twice are kept once, as
    they were written last; a line reports that, and which of the steps from `first` on have lost lines (None: any may).
    Raises CheckpointError when another line is broken.
    """
    lines: dict[tuple[int, int], bytes] = {}
    twice, wanted = set[int](), dict[int, int]()
    for place, line, rows in _logged_lines(path):
        if place[0] <= step:
            if place in lines:
                twice.add(place[0])
            lines[place] = line
            wanted[place[0]] = rows
    if path.exists():
        write_atomic(path, b"".join(lines[place] + b"\n" for place in sorted(lines)))
    found = Counter(number for number, _ in lines)
    lost = [] if first is None else [n for n in range(first, step + 1) if found[n] < wanted.get(n, 1)]
    if lost:
        tell(f"{path}: lines of step{_ranges(lost)} are missing: the run continues, and the log stays without them")
    if twice:
        tell(f"{path}: lines of step{_ranges(sorted(twice))} occur more than once: the last of each is kept")


def _logged_lines(path: Path) -> Iterator[tuple[tuple[int, int], bytes, int]]:
    """(step, row of the step), the line, and how many rows the step has, of each whole line."""
    if not path.exists():
        return
    with storage(path):
        whole, _, tail = read_regular(path).rpartition(b"\n")
    lines = whole.split(b"\n") if whole else []
    last = (0, -1)
    for number, line in enumerate([*lines, tail], start=1):
        try:
            values = json.loads(line)
            step, rows = values["step"], values.get("rows", 1)
            following = last[1] + 1 if last[0] == step else 0  # of a log that does not number its rows
            place = (step, values.get("row", following if "prompt" in values else 0))
            if not all(type(each) is int and each >= 0 for each in (*place, rows)):
                raise ValueError("no step")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if number > len(lines):  # cut short
                return
            raise CheckpointError("not a line of this run", f"{path}:{number}", "repair or remove it") from error
        last = place
        yield place, line, rows


def _ranges(steps: Sequence[int]) -> str:
    """As in `s 2, 5 to 7`, of ascending numbers; ` 2` of one."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and step == parts[-1][1] + 1:
            parts[-1][1] = step
        else:
            parts.append([step, step])
    shown = [f"{low}" if low == high else f"{low} to {high}" for low, high in parts]
    more = f" and {len(shown) - SHOWN} more places" if len(shown) > SHOWN else ""
    return f"{'s' if len(steps) > 1 else ''} {', '.join(shown[:SHOWN])}{more}"


def sync_to_disk(path: Path) -> None:
    """What was logged survives a power cut from here on; called before a checkpoint that counts on these lines."""
    if path.exists():
        with storage(path), path.open("rb") as file:
            os.fsync(file.fileno())


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append to a log. Raises CheckpointError when it cannot be written."""
    # Opened anew each time: the lines are there for readers at once, and a folder that went away is noticed.
    text = "".join(lines)
    with storage(path):
        failpoint("log.append")
        with path.open("ab") as file:
            file.write(text.encode())
    failpoint("log.appended")
