"""A view of the dashboard shows one state of a run, wherever another thread interrupts it."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from keel.errors import DataError
from keel.run import read
from keel.run.rollout_log import RolloutLog
from keel.server.limits import Refused
from keel.web import dashboard
from keel.web.dashboard.folder import RunsBelow
from keel.web.dashboard.query_parameters import QueryParameters
from keel.web.dashboard.views import VIEWS, curve_section, list_runs

from .board import WrittenRun, answer

FOLDERS = {str(Path(package.__file__ or "").parent) for package in (dashboard, read)}


@contextmanager
def interrupted(interrupt: Callable[[], None]) -> Iterator[None]:
    """Call `interrupt` before each line of the dashboard and of the run's readers that the block executes.

    Whatever another thread could do at that moment, `interrupt` can do, except to wait for a lock of the block.
    """

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename.rpartition("/")[0] not in FOLDERS:
            return None
        if event == "line":
            interrupt()
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(previous)


class ChangingRun:
    """A run that is rewritten as a whole: each time it has other steps and metrics, all of one new value."""

    def __init__(self, root: Path) -> None:
        self.written, self.version = WrittenRun(root / "changing").end(), 0
        self.other = WrittenRun(root / "other").go_on(2).end()
        self.rewrite()
        self.add_response()
        self.runs = RunsBelow(root)
        self.runs.search()
        self.watched = self.runs.runs[self.written.name]
        self.asked = QueryParameters(
            {"run": self.written.name, "of": self.written.name, "with": self.other.name, "at": "0", "there": "0"}
        )

    def rewrite(self) -> None:
        self.version += 1
        steps = self.version % 5 + 1
        values = {"objective/scores": self.version, f"metric/{steps}": self.version}
        lines = [json.dumps({"step": step, **values}) + "\n" for step in range(1, steps + 1)]
        (self.written.path / "metrics.jsonl").write_text("".join(lines))

    def add_response(self) -> None:
        RolloutLog(self.written.path / "rollouts.jsonl").log(1, [answer(1, self.version)])

    def rewrite_and_refresh(self) -> None:
        """Do what the request of another visitor does, unless the interrupted thread refreshes the run."""
        self.rewrite()
        self.watched.refresh(self.runs.doctor, wait=False)

    def check_summary(self, summary: dict[str, Any]) -> None:
        if summary["step"]:
            assert summary["headline"]["values"] == [summary["score"]] * summary["step"]
        assert summary["incomplete"] == []

    def check_curves(self, curves: list[dict[str, Any]]) -> None:
        assert len({tuple(curve["steps"]) for curve in curves}) <= 1
        assert len({value for curve in curves for value in curve["values"]}) <= 1
        assert all(len(curve["steps"]) == len(curve["values"]) for curve in curves)

    def check(self, path: str, result: Any) -> None:
        match path:
            case "/runs.json":
                self.check_summary(next(run for run in result["runs"] if run["name"] == self.written.name))
            case "/run/{run}/state.json":
                self.check_summary(result)
                curves = [curve for group in result["groups"] for curve in group["curves"]]
                self.check_curves(curves)
                assert curves[0]["steps"] == list(range(1, result["step"] + 1))
            case "/run/{run}/curves.json":
                self.check_curves(result)


@pytest.fixture
def run(tmp_path: Path) -> ChangingRun:
    return ChangingRun(tmp_path)


@pytest.mark.parametrize("path", VIEWS)
def test_a_view_shows_one_state_of_a_run_that_another_thread_refreshes(run: ChangingRun, path: str) -> None:
    first = run.version
    with suppress(Refused, DataError), interrupted(run.rewrite_and_refresh):
        run.check(path, VIEWS[path](run.runs, run.asked))
    assert run.version > first + 20


def test_nobody_sees_a_refresh_that_is_half_done(run: ChangingRun) -> None:
    looks = []

    def look() -> None:
        looks.append(list_runs(run.runs, run.asked)["runs"])
        run.check("/runs.json", {"runs": looks[-1]})
        run.check("/run/{run}/curves.json", curve_section(run.runs, run.asked))

    for _ in range(2):
        run.rewrite()
        run.add_response()
        with interrupted(look):
            run.watched.refresh(run.runs.doctor)
            run.watched.responses.refresh()
    assert len(looks) > 50
