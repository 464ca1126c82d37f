"""metrics.jsonl as columns that grow as the file grows. What is no line of figures is counted and passed over."""

import json
import time
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keel.run.read.run import NO_JSON, Run, Series, State, read_step
from keel.run.read.tail import GrowingFile

NAN = float("nan")
MOST_METRICS = 2_000  # a run of keel has about a hundred, and some for each scorer


class Metrics:
    """The figures of S lines. For one thread at a time."""

    def __init__(self, path: Path) -> None:
        self.file = GrowingFile(path)
        self.steps = array("q")  # [S]
        self.columns: dict[str, array[float]] = {}  # figure -> [S], nan where it was not measured
        self.broken = 0  # whole lines that hold no figures
        self.is_full = False  # whether it holds more figures than are kept
        self.cuts = 0  # how often the file was cut back, by a resume
        self.is_whole = False  # whether all that was there at the last look has been read

    def refresh(self, seconds: float) -> None:
        """Read what is new, whole lines only, for about so long. Raises OSError when it cannot be read."""
        if self.file.was_cut():
            self.file, self.steps, self.columns = GrowingFile(self.file.path), array("q"), {}
            self.broken, self.cuts = 0, self.cuts + 1
        end = time.monotonic() + seconds
        self.is_whole = True
        before = self.file.end
        for _, data in self.file.blocks():
            if self.file.end > before and time.monotonic() >= end:
                self.is_whole = False
                return
            for row in _rows(data.split(b"\n")[:-1]):
                self._add(row)

    @property
    def is_torn(self) -> bool:
        """Whether the file ends in the middle of a line."""
        return self.is_whole and self.file.is_torn

    def run(self, path: Path, settings: Mapping[str, Any], state: State) -> Run:
        """All so far. Of a step that was repeated, what was written last."""
        steps = np.array(self.steps, dtype=np.int64)
        columns = {name: _finite(np.array(values)) for name, values in self.columns.items()}
        if (np.diff(steps) <= 0).any():
            backwards, places = np.unique(steps[::-1], return_index=True)
            steps, columns = backwards, {name: values[::-1][places] for name, values in columns.items()}
        return Run(path, settings, steps, columns, state)

    def _add(self, row: Any) -> None:
        try:
            self.steps.append(read_step(row))
        except NO_JSON:
            self.broken += 1
            return
        count = len(self.steps)
        metrics = {name: value for name, value in row.items() if name != "step"}
        for name, value in metrics.items():
            column = self.columns.get(name)
            if column is None and len(self.columns) >= MOST_METRICS:
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


def _rows(lines: list[bytes]) -> list[Any]:
    """What each line holds; None where that is no JSON."""
    try:
        rows = json.loads(b"[" + b",".join(lines) + b"]")
    except NO_JSON:
        rows = []
    if len(rows) == len(lines):
        return list(rows)
    return [None] if len(lines) == 1 else [row for line in lines for row in _rows([line])]
