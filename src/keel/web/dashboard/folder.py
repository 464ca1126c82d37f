"""The runs below a folder. A page knows a run by a name that is no path: it leads nowhere but to a run found here."""

import hashlib
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keel.run.read.run import run_folders
from keel.server.limits import Refused, new_token
from keel.web.dashboard.doctor_thread import Doctor
from keel.web.dashboard.watched_run import WatchedRun

SHARE = 0.05  # of the time, at most, that is spent on looking for new runs
SECONDS = 2.0  # between two looks, at least
PATIENCE = 0.2  # seconds that a request for the list looks at runs for; the next one continues


class RunsBelow:
    """All runs below a folder."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).resolve()
        self.doctor = Doctor()
        self.lock = threading.Lock()
        self.runs: dict[str, WatchedRun] = {}
        self._look_again = 0.0
        self.listed = Listed()

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


class Listed:
    """What readers of the list know by a version of it, so that only what has changed since is sent."""

    def __init__(self) -> None:
        self.start, self.lock = new_token()[:8], threading.Lock()
        self.names: list[str] = []
        self.entries: dict[str, tuple[int, dict[str, Any]]] = {}  # name: when it changed, and what it is
        self.number = self.ordered = 0  # the last change, and the last one of which runs there are

    def since(self, version: str, summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The version of these summaries, those that changed since another, and all names if they did."""
        with self.lock:
            self._update(summaries)
            start, _, number = version.rpartition("-")  # a start may hold one
            known = int(number) if start == self.start and number.isdecimal() else -1
            changed = [entry for name in self.names for at, entry in [self.entries[name]] if at > known]
            names = self.names if self.ordered > known else None
            return {"version": f"{self.start}-{self.number}", "names": names, "runs": changed}

    def _update(self, summaries: Sequence[dict[str, Any]]) -> None:
        after, names = self.number + 1, [summary["name"] for summary in summaries]
        entries = {}
        for summary in summaries:
            known = self.entries.get(summary["name"])
            is_same = known is not None and (known[1] is summary or known[1] == summary)
            entries[summary["name"]] = (known[0], summary) if known is not None and is_same else (after, summary)
        if names != self.names:
            self.ordered = self.number = after
        if any(at == after for at, _ in entries.values()):
            self.number = after
        self.names, self.entries = names, entries


def run_name(path: Path, root: Path) -> str:
    """Stays the same over restarts, so a link to a run does."""
    return hashlib.sha256(os.fsencode(path.relative_to(root))).hexdigest()[:12]
