"""One run as the dashboard sees it: read again when its files changed, never written to."""

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
from keel.web.dashboard.doctor_thread import Case, Doctor
from keel.web.dashboard.file_state import appearance
from keel.web.dashboard.metric_columns import MOST_METRICS, Metrics
from keel.web.dashboard.response_list import RunResponses

PATIENCE = 0.6  # seconds that a request reads for; the next one continues
AT_ONCE = 1_000  # new points of a curve that travel; of more, the whole curve does, thinned
SPARK = 60  # points of the small curve in the list
HEADLINES = (
    "objective/scores",
    "reward/eval_accuracy",
    "dpo/eval_accuracy",
    "sft/eval_loss",
    "sft/loss",
    "reward/loss",
)


class WatchedRun:
    """Everything that is known of a run. One thread at a time looks; what it has found may be read by all."""

    def __init__(self, name: str, path: Path, root: Path) -> None:
        self.name, self.root, self.folder = name, root, RunFolder(path)
        title = path.relative_to(root).as_posix() if path != root else path.name
        self.title = title.encode(errors="replace").decode()
        self.lock = threading.Lock()
        self.looked = 0.0  # when, on the clock that never goes back
        self.metrics = Metrics(self.folder.metrics)
        self.answers = RunResponses(self.folder.rollouts)
        self.trouble = ""  # why it cannot be read
        self.run = Run(path, {}, np.array([], dtype=np.int64), {}, State("unknown"))
        self.case = Case()  # what the doctor says
        self._settings: tuple[tuple[int, int], dict[str, Any] | CheckpointError] = ((0, 0), {})
        self._seen: list[Any] = []  # how the files were when they were read to their ends
        self._summary: tuple[list[Any], dict[str, Any]] = ([], {})

    def look(self, doctor: Doctor, seconds: float = PATIENCE, wait: bool = True) -> None:
        """Read what is new for about so long, and send the run to the doctor when it is all there.

        Without `wait`, nothing is done while another thread looks.
        """
        if self.lock.acquire(blocking=wait):
            try:
                self._read(seconds)
                if self.metrics.is_whole and not self.trouble:
                    doctor.ask(self.case, self.run)
                self.looked = time.monotonic()
            finally:
                self.lock.release()

    def _read(self, seconds: float) -> None:
        before = (self.metrics.cuts, self.metrics.file.end, self._settings[0], self.run.state)
        seen = self._files()
        if (
            seen == self._seen and self.run.state.standing != "running"
        ):  # a process can go and leave its files as they are
            return
        self._seen = []
        try:
            self.check_links()
            self.metrics.refresh(seconds)
            self._read_settings()
            state = read_state(self.folder)
            self._seen = seen if self.metrics.is_whole else []
        except (CheckpointError, OSError) as error:
            self.trouble = str(error)
            return
        self.trouble = ""
        if before != (self.metrics.cuts, self.metrics.file.end, self._settings[0], state):
            run = self.metrics.run(self.folder.path, self._known_settings(), state)
            try:
                check_run_settings(run.settings, run.stage, self.folder.config.name)
            except CheckpointError as error:
                self.trouble = str(error)
            else:
                self.run = run

    @property
    def is_known(self) -> bool:
        """Whether all has been read, and the doctor has looked."""
        return bool(self.trouble) or (self.metrics.is_whole and self.case.is_seen)

    def summary(self) -> dict[str, Any]:
        """What the list of runs shows, and the head of the run's page; the same object until something has changed."""
        known = self.is_known  # before the diagnosis is taken: the doctor is at work
        says = [known, self.run, self.case.diagnosis, self.trouble, self.case.trouble, self._heard(), self.incomplete()]
        if [*map(_identity, says)] != [*map(_identity, self._summary[0])]:
            self._summary = (says, self._summarised(known))
        return self._summary[1]

    def _summarised(self, known: bool) -> dict[str, Any]:
        run, diagnosis = self.run, self.case.diagnosis
        finding = diagnosis.gravest if diagnosis else None
        return {
            "name": self.name,
            "title": self.title,
            "stage": run.stage,
            "standing": "unreadable" if self.trouble else run.state.standing,
            "what": self.trouble or run.state.what,
            "heard": self._heard(),
            "step": int(run.steps[-1]) if len(run.steps) else 0,
            "planned": run.planned,
            "verdict": diagnosis.verdict if diagnosis else "unknown",
            "finding": self.case.trouble or (finding.title if finding else ""),
            "findings": [f"{each.name} {each.title}" for each in diagnosis.findings] if diagnosis else [],
            "score": _last(run, "objective/scores"),
            "kl": _last(run, "objective/kl"),
            "headline": self._headline(),
            "incomplete": self.incomplete(),
            "known": known,
        }

    def details(self, since: int, version: str) -> dict[str, Any]:
        """The page of a run: the same, the findings, and the curves; only points after step `since` when the reader
        has the others of this version."""
        with self.lock:
            here = f"{self.metrics.cuts}-{sum(self.run.has(name) for name in self.run.columns)}"
            new = self.run.steps > since
            known = version == here and new.sum() <= AT_ONCE
            return {
                **self.summary(),
                "version": here,
                "is_whole": self.metrics.is_whole,
                "diagnosis": self.case.diagnosis.as_json()["findings"] if self.case.diagnosis else [],
                "groups": None if known else metric_groups(self.run),
                "points": self._points(new) if known else [],
            }

    def closely(self, steps: Range) -> list[dict[str, Any]]:
        """Some steps of all curves, in as much detail as a whole curve has."""
        low, high = steps
        return self._points((self.run.steps >= (low or 0)) & (self.run.steps <= (math.inf if high is None else high)))

    def incomplete(self) -> list[str]:
        """What is missing from the files, in words."""
        found = []
        running = self.run.state.standing == "running"  # whose last line may be in the making
        for file, broken, torn in (
            ("metrics.jsonl", self.metrics.broken, self.metrics.is_torn),
            ("rollouts.jsonl", self.answers.broken, self.answers.is_torn),
        ):
            if torn and not running:
                found.append(f"the last line of {file} was cut short")
            if broken:
                found.append(f"{broken} broken line{'s' if broken > 1 else ''} in {file} passed over")
        if self.metrics.is_full:
            found.append(f"metrics.jsonl holds more than {MOST_METRICS} figures; the others are passed over")
        return found

    def _points(self, chosen: Any) -> list[dict[str, Any]]:
        """These steps of every figure that was measured in them."""
        found = []
        for metric, values in self.run.columns.items():
            kept = chosen & np.isfinite(values) if is_sparse(metric) else chosen
            steps, points = thin_curve(self.run.steps[kept], values[kept])
            found.append(
                {"figure": metric, "steps": steps, "values": points, "trend": trend(self.run.steps[kept], values[kept])}
            )
        return [points for points in found if points["steps"]]

    def _headline(self) -> dict[str, Any] | None:
        """The figure that says most about a run of its stage, with its small curve."""
        metric = next((name for name in HEADLINES if self.run.has(name)), None)
        if metric is None:
            return None
        measured = np.isfinite(self.run[metric])
        _, values = thin_curve(self.run.steps[measured], self.run[metric][measured], SPARK)
        return {"figure": metric, "last": values[-1], "values": values}

    def _heard(self) -> float:
        """When the run wrote last, in seconds since 1970; 0 if never."""
        times = [0.0]
        for path in (self.folder.metrics, self.folder.rollouts, self.folder.ended, self.folder.config):
            with suppress(OSError):
                times.append(path.stat().st_mtime)
        return max(times)

    def _read_settings(self) -> None:
        """Once, also where they cannot be read, until the file changes. Raises CheckpointError."""
        status = self.folder.config.stat()
        changed = (status.st_mtime_ns, status.st_size)
        if changed != self._settings[0]:
            try:
                self._settings = (changed, self.folder.settings())
            except CheckpointError as error:
                self._settings = (changed, error)
        self._known_settings()

    def _known_settings(self) -> dict[str, Any]:
        if isinstance(self._settings[1], CheckpointError):
            raise self._settings[1]
        return self._settings[1]

    def _files(self) -> list[Any]:
        """How each file of the run is now, and each link in its place."""
        return [appearance(path) for path in self._paths]

    @property
    def _paths(self) -> list[Path]:
        folder = self.folder
        return [folder.config, folder.metrics, folder.rollouts, folder.ended, folder.path / ".lock"]

    def check_links(self) -> None:
        """Raises CheckpointError when a file of the run is a link that leads out of the folder that is served."""
        for path in self._paths:
            if not Path(os.path.realpath(path)).is_relative_to(self.root):
                raise CheckpointError("a link that leads out of the folder is not followed", where=path.name)


def _identity(value: Any) -> Any:
    """What tells whether a value is still the same: runs and diagnoses are made anew and not changed."""
    return id(value) if isinstance(value, Run | Diagnosis) else value


def _last(run: Run, metric: str) -> float | None:
    """The last one that was measured."""
    values = run[metric][np.isfinite(run[metric])]
    return round_value(values[-1]) if len(values) else None
