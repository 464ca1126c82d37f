"""Log the metrics of a run: one JSON object a line, which other programs can read during the run."""

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
from keel.run.json_values import replace_non_finite
from keel.terminal import print_line

SHOWN = 8  # most ranges of steps to list in a message


class MetricSink(Protocol):
    """A destination for the metrics of each step."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlMetrics:
    """Writes a line `{"step": 3, "objective/kl": 0.1, ...}` for each step. Values that are not finite become null."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step. Raises CheckpointError when the file cannot be written."""
        line = json.dumps({"step": step, **replace_non_finite(metrics)}, ensure_ascii=False, allow_nan=False)
        append_lines(self._path, [line + "\n"])

    def close(self) -> None:
        """Do nothing: the file is open only while a line is written."""


class TensorBoardMetrics:
    """Writes the metrics as TensorBoard events. `first_step` > 1 hides the later events of an interrupted run."""

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
    """Open the metric sinks of a run, and close them at the end of the block.

    Args:
        trackers: more sinks besides metrics.jsonl.
        done: last step to keep in the file; lines of later steps are dropped.
        first: step of the first line.

    Raises CheckpointError for a broken line, ConfigError for a tracker that is not installed.
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
    """Keep the lines of a log up to `step`, from which a run continues, each once and in the order of the steps.

    A last line that a crash cut short is dropped. Of repeated lines the last is kept. Missing and repeated lines are
    reported.

    Args:
        first: first step that must have lines; None: any step may have none.

    Raises CheckpointError for any other broken line.
    """
    lines: dict[tuple[int, int], bytes] = {}
    repeated, expected = set[int](), dict[int, int]()
    for key, line, rows in _logged_lines(path):
        if key[0] <= step:
            if key in lines:
                repeated.add(key[0])
            lines[key] = line
            expected[key[0]] = rows
    if path.exists():
        write_atomic(path, b"".join(lines[key] + b"\n" for key in sorted(lines)))
    counts = Counter(number for number, _ in lines)
    missing = [] if first is None else [n for n in range(first, step + 1) if counts[n] < expected.get(n, 1)]
    if missing:
        print_line(
            f"{path}: lines of step{_ranges(missing)} are missing: the run continues, and the log stays without them"
        )
    if repeated:
        print_line(f"{path}: lines of step{_ranges(sorted(repeated))} occur more than once: the last of each is kept")


def _logged_lines(path: Path) -> Iterator[tuple[tuple[int, int], bytes, int]]:
    """Yield (step, row in the step), the line and the number of rows of the step, for each complete line."""
    if not path.exists():
        return
    with storage(path):
        complete, _, tail = read_regular(path).rpartition(b"\n")
    lines = complete.split(b"\n") if complete else []
    last = (0, -1)
    for number, line in enumerate([*lines, tail], start=1):
        try:
            values = json.loads(line)
            step, rows = values["step"], values.get("rows", 1)
            following = last[1] + 1 if last[0] == step else 0  # for a log that does not number its rows
            key = (step, values.get("row", following if "prompt" in values else 0))
            if not all(type(each) is int and each >= 0 for each in (*key, rows)):
                raise ValueError("no step")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if number > len(lines):  # the last line has no line feed: a crash cut it short
                return
            raise CheckpointError("not a line of this run", f"{path}:{number}", "repair or remove the line") from error
        last = key
        yield key, line, rows


def _ranges(steps: Sequence[int]) -> str:
    """Format ascending steps as `s 2, 5 to 7`, and a single step as ` 2`, to follow the word "step"."""
    ranges: list[list[int]] = []
    for step in steps:
        if ranges and step == ranges[-1][1] + 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    shown = [f"{low}" if low == high else f"{low} to {high}" for low, high in ranges]
    more = f" and {len(shown) - SHOWN} more places" if len(shown) > SHOWN else ""
    return f"{'s' if len(steps) > 1 else ''} {', '.join(shown[:SHOWN])}{more}"


def sync_to_disk(path: Path) -> None:
    """Make the log survive a power failure. Called before a checkpoint, which relies on the lines logged so far."""
    if path.exists():
        with storage(path), path.open("rb") as file:
            os.fsync(file.fileno())


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append to a log. Raises CheckpointError when it cannot be written."""
    # The file is opened each time: readers see the lines at once, and a folder that was deleted is noticed.
    text = "".join(lines)
    with storage(path):
        failpoint("log.append")
        with path.open("ab") as file:
            file.write(text.encode())
    failpoint("log.appended")
