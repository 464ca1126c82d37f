"""The runs below a folder. Pages know a run by a hash of its path, so no request can name a path on disk."""

import hashlib
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keel.run.read.run import run_folders
from keel.server.limits import Refused, new_token
from keel.web.dashboard.doctor_thread import DoctorThread
from keel.web.dashboard.watched_run import WatchedRun

MAX_SEARCH_SHARE = 0.05  # of the time that may be spent on searching for new runs
MIN_SEARCH_INTERVAL = 2.0  # seconds
LIST_SECONDS = 0.2  # for which a request for the list reads runs; the next request continues


class RunsBelow:
    """All runs below a folder."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).resolve()
        self.doctor = DoctorThread()
        self.lock = threading.Lock()
        self.runs: dict[str, WatchedRun] = {}
        self._next_search = 0.0  # time.monotonic()
        self.versions = SummaryVersions()

    def run(self, name: str) -> WatchedRun:
        """Return the run of this name. Raises Refused."""
        if name not in self.runs:
            self.search()
        try:
            return self.runs[name]
        except KeyError:
            raise Refused(404, "There is no such run (any more).") from None

    def search(self) -> None:
        """Search for new runs, unless the last search is too recent."""
        with self.lock:
            began = time.monotonic()
            if began < self._next_search:
                return
            paths = {run_name(path, self.root): path for path in sorted(run_folders(self.root))}
            self.runs = {name: self.runs.get(name) or WatchedRun(name, path, self.root) for name, path in paths.items()}
            now = time.monotonic()
            self._next_search = now + max(MIN_SEARCH_INTERVAL, (now - began) / MAX_SEARCH_SHARE)

    def summaries(self) -> list[dict[str, Any]]:
        """Return the summary of every run, ordered by path. Runs that were not read in time follow with later calls."""
        self.search()
        end = time.monotonic() + LIST_SECONDS
        runs = list(self.runs.values())
        for run in sorted(runs, key=lambda run: run.refreshed_at):  # the stalest first
            run.refresh(self.doctor, max(0.0, end - time.monotonic()), wait=False)
            if time.monotonic() >= end:
                break
        return [run.summary() for run in runs]


class SummaryVersions:
    """A version number for the list of runs, so that a client gets only what changed since its version."""

    def __init__(self) -> None:
        self.start, self.lock = new_token()[:8], threading.Lock()
        self.names: list[str] = []
        self.entries: dict[str, tuple[int, dict[str, Any]]] = {}  # run -> number of its last change, summary
        self.number = 0  # of the last change
        self.names_number = 0  # of the last change of the list of names

    def changes_since(self, version: str, summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the current version, the summaries that changed since `version`, and all names if they changed."""
        with self.lock:
            self._update(summaries)
            start, _, number = version.rpartition("-")  # from the right, because a start may contain a hyphen
            known = int(number) if start == self.start and number.isdecimal() else -1
            changed = [summary for name in self.names for at, summary in [self.entries[name]] if at > known]
            names = self.names if self.names_number > known else None
            return {"version": f"{self.start}-{self.number}", "names": names, "runs": changed}

    def _update(self, summaries: Sequence[dict[str, Any]]) -> None:
        next_number, names = self.number + 1, [summary["name"] for summary in summaries]
        entries = {}
        for summary in summaries:
            entry = self.entries.get(summary["name"])
            # The identity check spares a comparison of long summaries, which WatchedRun reuses while nothing changes.
            is_same = entry is not None and (entry[1] is summary or entry[1] == summary)
            entries[summary["name"]] = (entry[0], summary) if entry is not None and is_same else (next_number, summary)
        if names != self.names:
            self.names_number = self.number = next_number
        if any(at == next_number for at, _ in entries.values()):
            self.number = next_number
        self.names, self.entries = names, entries


def run_name(path: Path, root: Path) -> str:
    """Return a hash of the path below the root. It is the same after a restart, so links to a run stay valid."""
    return hashlib.sha256(os.fsencode(path.relative_to(root))).hexdigest()[:12]
