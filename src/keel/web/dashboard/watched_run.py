"""One run in the dashboard: read again after its files have changed, never written."""

import math
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from keel.diagnosis.findings import Diagnosis
from keel.errors import CheckpointError
from keel.run.folder import RunFolder
from keel.run.read.curves import is_sparse, metric_groups, round_value, thin_curve, trend
from keel.run.read.responses import Range
from keel.run.read.run import Run, State, read_state
from keel.run.read.settings import check_run_settings
from keel.web.dashboard.doctor_thread import DoctorThread, RunDiagnosis
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


class WatchedRun:
    """All that the dashboard knows of a run. One thread at a time refreshes it; any thread may read the results."""

    def __init__(self, name: str, path: Path, root: Path) -> None:
        self.name, self.root, self.folder = name, root, RunFolder(path)
        title = path.relative_to(root).as_posix() if path != root else path.name
        self.title = title.encode(errors="replace").decode()  # file names on Linux need not be valid UTF-8
        self.lock = threading.Lock()
        self.refreshed_at = 0.0  # time.monotonic()
        self.metrics = MetricColumns(self.folder.metrics)
        self.responses = RunResponses(self.folder.rollouts)
        self.trouble = ""  # why the run cannot be read
        self.run = Run(path, {}, np.array([], dtype=np.int64), {}, State("unknown"))
        self.doctor = RunDiagnosis()
        self._settings: tuple[tuple[int, int], dict[str, Any] | CheckpointError] = ((0, 0), {})
        self._read_signatures: list[Any] = []  # of the files when they were last read to their ends
        self._summary: tuple[list[Any], dict[str, Any]] = ([], {})

    def refresh(self, doctor: DoctorThread, seconds: float = MAX_SECONDS, wait: bool = True) -> None:
        """Read new lines for about this many seconds. Queue the run for the doctor once it is read completely.

        Without `wait`, do nothing if another thread is refreshing the run.
        """
        if self.lock.acquire(blocking=wait):
            try:
                self._read(seconds)
                if self.metrics.is_complete and not self.trouble:
                    doctor.request(self.doctor, self.run)
                self.refreshed_at = time.monotonic()
            finally:
                self.lock.release()

    def _read(self, seconds: float) -> None:
        previous = (self.metrics.cuts, self.metrics.file.end, self._settings[0], self.run.state)
        signatures = self._file_signatures()
        # A run that is marked as running is read again in any case: its process may end without changing a file.
        if signatures == self._read_signatures and self.run.state.standing != "running":
            return
        self._read_signatures = []
        try:
            self.check_links()
            self.metrics.refresh(seconds)
            self._read_settings()
            state = read_state(self.folder)
            self._read_signatures = signatures if self.metrics.is_complete else []
        except (CheckpointError, OSError) as error:
            self.trouble = str(error)
            return
        self.trouble = ""
        if previous != (self.metrics.cuts, self.metrics.file.end, self._settings[0], state):
            run = self.metrics.run(self.folder.path, self._known_settings(), state)
            try:
                check_run_settings(run.settings, run.stage, self.folder.config.name)
            except CheckpointError as error:
                self.trouble = str(error)
            else:
                self.run = run

    @property
    def is_known(self) -> bool:
        """Whether the run is read completely and diagnosed."""
        return bool(self.trouble) or (self.metrics.is_complete and self.doctor.is_done)

    def summary(self) -> dict[str, Any]:
        """Return the row of the run in the list, and the head of its page. The same object while nothing changes."""
        # Read is_known before the diagnosis, which the doctor's thread sets first. The other order could combine an
        # old diagnosis with is_known = True.
        known = self.is_known
        inputs = [
            known,
            self.run,
            self.doctor.diagnosis,
            self.trouble,
            self.doctor.trouble,
            self._last_write(),
            self.missing_data(),
        ]
        if [*map(_comparable, inputs)] != [*map(_comparable, self._summary[0])]:
            self._summary = (inputs, self._build_summary(known))
        return self._summary[1]

    def _build_summary(self, known: bool) -> dict[str, Any]:
        run, diagnosis = self.run, self.doctor.diagnosis
        finding = diagnosis.gravest if diagnosis else None
        return {
            "name": self.name,
            "title": self.title,
            "stage": run.stage,
            "standing": "unreadable" if self.trouble else run.state.standing,
            "what": self.trouble or run.state.what,
            "heard": self._last_write(),
            "step": int(run.steps[-1]) if len(run.steps) else 0,
            "planned": run.planned,
            "verdict": diagnosis.verdict if diagnosis else "unknown",
            "finding": self.doctor.trouble or (finding.title if finding else ""),
            "findings": [f"{each.name} {each.title}" for each in diagnosis.findings] if diagnosis else [],
            "score": _last_value(run, "objective/scores"),
            "kl": _last_value(run, "objective/kl"),
            "headline": self._headline(),
            "incomplete": self.missing_data(),
            "known": known,
        }

    def details(self, since: int, version: str) -> dict[str, Any]:
        """Return the summary, the findings and the curves of a run.

        Args:
            since: Last step that the client has.
            version: Version of the curves that the client has. If it is current, only points after `since` are sent.
        """
        with self.lock:
            current = f"{self.metrics.cuts}-{sum(self.run.has(name) for name in self.run.columns)}"
            new = self.run.steps > since
            only_new = version == current and new.sum() <= MAX_NEW_POINTS
            return {
                **self.summary(),
                "version": current,
                "is_whole": self.metrics.is_complete,
                "diagnosis": self.doctor.diagnosis.as_json()["findings"] if self.doctor.diagnosis else [],
                "groups": None if only_new else metric_groups(self.run),
                "points": self._points(new) if only_new else [],
            }

    def curves_between(self, steps: Range) -> list[dict[str, Any]]:
        """Return a range of steps of all curves, with as many points as an entire curve has."""
        low, high = steps
        return self._points((self.run.steps >= (low or 0)) & (self.run.steps <= (math.inf if high is None else high)))

    def missing_data(self) -> list[str]:
        """Describe what is missing from the files."""
        notes = []
        running = self.run.state.standing == "running"  # then the last line may be in the middle of a write
        for file, broken, is_torn in (
            ("metrics.jsonl", self.metrics.broken, self.metrics.is_torn),
            ("rollouts.jsonl", self.responses.broken, self.responses.is_torn),
        ):
            if is_torn and not running:
                notes.append(f"the last line of {file} is incomplete")
            if broken:
                notes.append(f"{broken} broken line{'s' if broken > 1 else ''} in {file} skipped")
        if self.metrics.is_full:
            notes.append(f"metrics.jsonl holds more than {MAX_METRICS} metrics; the others are skipped")
        return notes

    def _points(self, selected: Any) -> list[dict[str, Any]]:
        """Return the selected steps of every metric that was measured in them. `selected` is a bool per step."""
        curves = []
        for metric, values in self.run.columns.items():
            mask = selected & np.isfinite(values) if is_sparse(metric) else selected
            steps, points = thin_curve(self.run.steps[mask], values[mask])
            curves.append(
                {"figure": metric, "steps": steps, "values": points, "trend": trend(self.run.steps[mask], values[mask])}
            )
        return [curve for curve in curves if curve["steps"]]

    def _headline(self) -> dict[str, Any] | None:
        """Return the main metric of the run's stage, with a small curve."""
        metric = next((name for name in HEADLINES if self.run.has(name)), None)
        if metric is None:
            return None
        measured = np.isfinite(self.run[metric])
        _, values = thin_curve(self.run.steps[measured], self.run[metric][measured], SPARKLINE_POINTS)
        return {"figure": metric, "last": values[-1], "values": values}

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


def _comparable(value: Any) -> Any:
    """Return what to compare to detect a change: the identity of runs and diagnoses, which are never modified."""
    return id(value) if isinstance(value, Run | Diagnosis) else value


def _last_value(run: Run, metric: str) -> float | None:
    """Return the last measured value."""
    values = run[metric][np.isfinite(run[metric])]
    return round_value(values[-1]) if len(values) else None
