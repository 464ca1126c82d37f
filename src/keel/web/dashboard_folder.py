"""The runs below a folder. A page knows a run by a name that is no path: it leads nowhere but to a run found here."""

import hashlib
import os
import threading
import time
from pathlib import Path
from typing import Any

from keel.diagnose.run import run_folders
from keel.server.limits import Refused
from keel.web.dashboard_doctor import Doctor
from keel.web.dashboard_run import WatchedRun

SHARE = 0.05  # of the time, at most, that is spent on looking for new runs
SECONDS = 2.0  # between two looks, at least
PATIENCE = 0.2  # seconds that a request for the list looks at runs for; the next one goes on


class RunsBelow:
    """All runs below a folder."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).resolve()
        self.doctor = Doctor()
        self.lock = threading.Lock()
        self.runs: dict[str, WatchedRun] = {}
        self._look_again = 0.0

    def run(self, name: str) -> WatchedRun:
        """The run of this name. Raises Refused."""
        if name not in self.runs:
            self.find()
        try:
            return self.runs[name]
        except KeyError:
            raise Refused(404, "There is no such run (any more).") from None

    def find(self) -> None:
        """Look for new runs, unless that was just done."""
        with self.lock:
            began = time.monotonic()
            if began < self._look_again:
                return
            paths = {run_name(path, self.root): path for path in sorted(run_folders(self.root))}
            self.runs = {name: self.runs.get(name) or WatchedRun(name, path, self.root) for name, path in paths.items()}
            now = time.monotonic()
            self._look_again = now + max(SECONDS, (now - began) / SHARE)

    def summaries(self) -> list[dict[str, Any]]:
        """Of every run, in the order of their paths; what could not be read in time comes with the next call."""
        self.find()
        end = time.monotonic() + PATIENCE
        runs = list(self.runs.values())
        for run in sorted(runs, key=lambda run: run.looked):  # who waited longest first
            run.look(self.doctor, max(0.0, end - time.monotonic()), wait=False)
            if time.monotonic() >= end:
                break
        return [run.summary() for run in runs]


def run_name(path: Path, root: Path) -> str:
    """Stays the same over restarts, so a link to a run does."""
    return hashlib.sha256(os.fsencode(path.relative_to(root))).hexdigest()[:12]
