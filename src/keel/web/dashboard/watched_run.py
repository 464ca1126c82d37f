"""One run in the dashboard: read again after its files have changed, never written."""

import math
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from keel.errors import CheckpointError
from keel.run.folder import RunFolder
from keel.run.read.curves import is_sparse, metric_groups, round_value, thin_curve, trend
from keel.run.read.responses import Range
from keel.run.read.run import Run, State, read_state
from keel.run.read.settings import check_run_settings
from keel.web.dashboard.doctor_thread import DoctorResult, DoctorThread, RunDiagnosis
from keel.web.dashboard.file_gaps import FileGaps
from keel.web.dashboard.file_state import file_signature
from keel.web.dashboard.metric_columns import MAX_METRICS, MetricColumns
from keel.web.dashboard.response_list import RunResponses

MAX_SECONDS = 0.6  # for which a request reads; the next request continues
MAX_NEW_POINTS = 1_000  # of a curve in one response; with more, the entire curve is sent again, thinned
SPARKLINE_POINTS = 60  # of the small curve in the list
HEADLINES = (
    "objective/scores",
    "reward/eval_accuracy",
    "dpo/eval_accuracy",
    "sft/eval_loss",
    "sft/loss",
    "reward/loss",
)


@dataclass(frozen=True)
class Snapshot:
    """A run as it was after one refresh. It never changes, so any thread may read it."""

    run: Run
    trouble: str = ""  # why the run cannot be read; `run` is the last state that could be
    cuts: int = 0  # how often metrics.jsonl was truncated
    is_complete: bool = False  # metrics.jsonl was read to its end
    gaps: FileGaps = field(default_factory=FileGaps)  # of metrics.jsonl
    is_full: bool = False  # metrics.jsonl has more metrics than are kept


class WatchedRun:
    """All that the dashboard knows of a run.

    One thread at a time refreshes it, and publishes the result as a new snapshot. Any thread may read the snapshot, but
    must take it once: two reads of `self.snapshot` may give two states of the run, with different numbers of steps.
    """

    def __init__(self, name: str, path: Path, root: Path) -> None:
        self.name, self.root, self.folder = name, root, RunFolder(path)
        title = path.relative_to(root).as_posix() if path != root else path.name
        self.title = title.encode(errors="replace").decode()  # file names on Linux need not be valid UTF-8
        self.lock = threading.Lock()
        self.refreshed_at = 0.0  # time.monotonic()
        self.metrics = MetricColumns(self.folder.metrics)
        self.responses = RunResponses(self.folder.rollouts)
        self.snapshot = Snapshot(Run(path, {}, np.array([], dtype=np.int64), {}, State("unknown")))
        self.doctor = RunDiagnosis()
        self._settings: tuple[tuple[int, int], dict[str, Any] | CheckpointError] = ((0, 0), {})
        self._read_signatures: list[Any] = []  # of the files when they were last read to their ends
        self._run_inputs: tuple[Any, ...] = ()  # from which the run of the snapshot was built
        self._summary: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})  # the last one, after its inputs

    def refresh(self, doctor: DoctorThread, seconds: float = MAX_SECONDS, wait: bool = True) -> None:
        """Read new lines for about this many seconds. Queue the run for the doctor once it is read completely.

        Without `wait`, do nothing if another thread is refreshing the run.
        """
        if self.lock.acquire(blocking=wait):
            try:
                self._read(seconds)
                if self.snapshot.is_complete and not self.snapshot.trouble:
                    doctor.request(self.doctor, self.snapshot.run)
                self.refreshed_at = time.monotonic()
            finally:
                self.lock.release()

    def _read(self, seconds: float) -> None:
        signatures = self._file_signatures()
        # A run that is marked as running is read again in any case: its process may end without changing a file.
        if signatures == self._read_signatures and self.snapshot.run.state.standing != "running":
            return
        self._read_signatures = []
        try:
            self.check_links()
            self.metrics.refresh(seconds)
            self._read_settings()
            state = read_state(self.folder)
            self._read_signatures = signatures if self.metrics.is_complete else []
            run = self._current_run(state)
        except (CheckpointError, OSError) as error:
            self.snapshot = replace(self.snapshot, trouble=str(error))
            return
        metrics = self.metrics
        self.snapshot = Snapshot(run, "", metrics.cuts, metrics.is_complete, metrics.gaps, metrics.is_full)

    def _current_run(self, state: State) -> Run:
        """Return the run as read so far. The same object while nothing changes. Raises CheckpointError."""
        inputs = (self.metrics.cuts, self.metrics.file.end, self._settings[0], state)
        if inputs == self._run_inputs:
            return self.snapshot.run
        run = self.metrics.run(self.folder.path, self._known_settings(), state)
        check_run_settings(run.settings, run.stage, self.folder.config.name)
        self._run_inputs = inputs
        return run

    def summary(self) -> dict[str, Any]:
        """Return the row of the run in the list, and the head of its page. The same object while nothing changes."""
        return self._summary_of(self.snapshot, self.doctor.result)

    def _summary_of(self, snapshot: Snapshot, result: DoctorResult) -> dict[str, Any]:
        inputs = (snapshot, result, self.responses.gaps, self._last_write())
        previous_inputs, summary = self._summary
        if inputs != previous_inputs:
            summary = self._build_summary(*inputs)
            self._summary = (inputs, summary)
        return summary

    def _build_summary(
        self, snapshot: Snapshot, result: DoctorResult, response_gaps: FileGaps, last_write: float
    ) -> dict[str, Any]:
        run, diagnosis = snapshot.run, result.diagnosis
        finding = diagnosis.gravest if diagnosis else None
        return {
            "name": self.name,
            "title": self.title,
            "stage": run.stage,
            "standing": "unreadable" if snapshot.trouble else run.state.standing,
            "what": snapshot.trouble or run.state.what,
            "heard": last_write,
            "step": int(run.steps[-1]) if len(run.steps) else 0,
            "planned": run.planned,
            "verdict": diagnosis.verdict if diagnosis else "unknown",
            "finding": result.trouble or (finding.title if finding else ""),
            "findings": [f"{each.name} {each.title}" for each in diagnosis.findings] if diagnosis else [],
            "score": _last_value(run, "objective/scores"),
            "kl": _last_value(run, "objective/kl"),
            "headline": _headline(run),
            "incomplete": _missing_data(snapshot, response_gaps),
            # The run is read completely and diagnosed, or cannot be read.
            "known": bool(snapshot.trouble) or (snapshot.is_complete and result.run is not None),
        }

    def details(self, since: int, version: str) -> dict[str, Any]:
        """Return the summary, the findings and the curves of a run.

        Args:
            since: Last step that the client has.
            version: Version of the curves that the client has. If it is current, only points after `since` are sent.
        """
        snapshot, result = self.snapshot, self.doctor.result
        run = snapshot.run
        current = f"{snapshot.cuts}-{sum(run.has(name) for name in run.columns)}"
        new = run.steps > since
        only_new = version == current and new.sum() <= MAX_NEW_POINTS
        return {
            **self._summary_of(snapshot, result),
            "version": current,
            "is_whole": snapshot.is_complete,
            "diagnosis": result.diagnosis.as_json()["findings"] if result.diagnosis else [],
            "groups": None if only_new else metric_groups(run),
            "points": _points(run, new) if only_new else [],
        }

    def curves_between(self, steps: Range) -> list[dict[str, Any]]:
        """Return a range of steps of all curves, with as many points as an entire curve has."""
        low, high = steps
        run = self.snapshot.run
        return _points(run, (run.steps >= (low or 0)) & (run.steps <= (math.inf if high is None else high)))

    def _last_write(self) -> float:
        """Return the time of the last write to a file of the run, in seconds since 1970; 0 if there is none."""
        times = [0.0]
        for path in (self.folder.metrics, self.folder.rollouts, self.folder.ended, self.folder.config):
            with suppress(OSError):
                times.append(path.stat().st_mtime)
        return max(times)

    def _read_settings(self) -> None:
        """Read the settings if the file has changed, and keep the result, even if it is an error.

        Raises CheckpointError.
        """
        status = self.folder.config.stat()
        version = (status.st_mtime_ns, status.st_size)
        if version != self._settings[0]:
            try:
                self._settings = (version, self.folder.settings())
            except CheckpointError as error:
                self._settings = (version, error)
        self._known_settings()

    def _known_settings(self) -> dict[str, Any]:
        if isinstance(self._settings[1], CheckpointError):
            raise self._settings[1]
        return self._settings[1]

    def _file_signatures(self) -> list[Any]:
        return [file_signature(path) for path in self._paths]

    @property
    def _paths(self) -> list[Path]:
        folder = self.folder
        return [folder.config, folder.metrics, folder.rollouts, folder.ended, folder.path / ".lock"]

    def check_links(self) -> None:
        """Raise CheckpointError if a file of the run is a link to a place outside the served folder."""
        for path in self._paths:
            if not Path(os.path.realpath(path)).is_relative_to(self.root):
                raise CheckpointError("a link out of the served folder is not followed", where=path.name)


def _missing_data(snapshot: Snapshot, response_gaps: FileGaps) -> list[str]:
    """Describe what is missing from the files."""
    is_running = snapshot.run.state.standing == "running"
    notes = snapshot.gaps.notes("metrics.jsonl", is_running) + response_gaps.notes("rollouts.jsonl", is_running)
    if snapshot.is_full:
        notes.append(f"metrics.jsonl holds more than {MAX_METRICS} metrics; the others are skipped")
    return notes


def _points(run: Run, selected: Any) -> list[dict[str, Any]]:
    """Return the selected steps of every metric that was measured in them. `selected` is a bool per step."""
    curves = []
    for metric, values in run.columns.items():
        mask = selected & np.isfinite(values) if is_sparse(metric) else selected
        steps, points = thin_curve(run.steps[mask], values[mask])
        curves.append(
            {"figure": metric, "steps": steps, "values": points, "trend": trend(run.steps[mask], values[mask])}
        )
    return [curve for curve in curves if curve["steps"]]


def _headline(run: Run) -> dict[str, Any] | None:
    """Return the main metric of the run's stage, with a small curve."""
    metric = next((name for name in HEADLINES if run.has(name)), None)
    if metric is None:
        return None
    measured = np.isfinite(run[metric])
    _, values = thin_curve(run.steps[measured], run[metric][measured], SPARKLINE_POINTS)
    return {"figure": metric, "last": values[-1], "values": values}


def _last_value(run: Run, metric: str) -> float | None:
    """Return the last measured value."""
    values = run[metric][np.isfinite(run[metric])]
    return round_value(values[-1]) if len(values) else None
