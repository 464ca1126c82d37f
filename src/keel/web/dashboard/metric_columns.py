"""metrics.jsonl as columns that grow with the file. Lines that hold no metrics are counted and skipped."""

import json
import time
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keel.run.read.run import NO_JSON, Run, Series, State, read_step
from keel.run.read.tail import GrowingFile
from keel.web.dashboard.file_gaps import FileGaps

NAN = float("nan")
MAX_METRICS = 2_000  # a run of keel has about a hundred, and a few for each scorer


class MetricColumns:
    """The metrics of S logged steps. Not thread-safe."""

    def __init__(self, path: Path) -> None:
        self.file = GrowingFile(path)
        self.steps = array("q")  # [S]
        self.columns: dict[str, array[float]] = {}  # metric -> [S], NaN where it was not measured
        self.broken = 0  # complete lines that hold no metrics
        self.is_full = False  # the file has more metrics than are kept
        self.cuts = 0  # how often the file was truncated, as a resume does
        self.is_complete = False  # the last refresh read to the end of the file

    def refresh(self, seconds: float) -> None:
        """Read new complete lines for about this many seconds. Raises OSError."""
        if self.file.was_cut():
            self.file, self.steps, self.columns = GrowingFile(self.file.path), array("q"), {}
            self.broken, self.cuts = 0, self.cuts + 1
        end = time.monotonic() + seconds
        self.is_complete = True
        start = self.file.end
        for _, data in self.file.blocks():
            # At least one block is read, however little time there is, so that each call makes progress.
            if self.file.end > start and time.monotonic() >= end:
                self.is_complete = False
                return
            for row in _parse_lines(data.split(b"\n")[:-1]):
                self._append(row)

    @property
    def gaps(self) -> FileGaps:
        return FileGaps(self.broken, self.is_complete and self.file.is_torn)

    def run(self, path: Path, settings: Mapping[str, Any], state: State) -> Run:
        """Return the run as read so far. If a step was logged more than once, its last line counts."""
        steps = np.array(self.steps, dtype=np.int64)
        columns = {name: _finite(np.array(values)) for name, values in self.columns.items()}
        if (np.diff(steps) <= 0).any():
            # Reversed, because unique() returns the first occurrence, and the last one is wanted.
            steps, last = np.unique(steps[::-1], return_index=True)
            columns = {name: values[::-1][last] for name, values in columns.items()}
        return Run(path, settings, steps, columns, state)

    def _append(self, row: Any) -> None:
        try:
            self.steps.append(read_step(row))
        except NO_JSON:
            self.broken += 1
            return
        count = len(self.steps)
        metrics = {name: value for name, value in row.items() if name != "step"}
        for name, value in metrics.items():
            column = self.columns.get(name)
            if column is None and len(self.columns) >= MAX_METRICS:
                self.is_full = True
                continue
            if column is None:
                column = self.columns[name] = array("d", [NAN]) * (count - 1)
            try:
                column.append(value)
            except (TypeError, OverflowError):
                column.append(NAN)
        if self.is_full or len(metrics) < len(self.columns):
            for column in self.columns.values():
                column.extend([NAN] * (count - len(column)))


def _finite(values: Series) -> Series:
    return np.where(np.isfinite(values), values, np.nan)


def _parse_lines(lines: list[bytes]) -> list[Any]:
    """Parse each line as JSON; None for a line that is not JSON."""
    try:
        # One call for all lines is much faster than one call per line.
        rows = json.loads(b"[" + b",".join(lines) + b"]")
    except NO_JSON:
        rows = []
    if len(rows) == len(lines):
        return list(rows)
    return [None] if len(lines) == 1 else [row for line in lines for row in _parse_lines([line])]
