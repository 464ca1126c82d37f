"""The doctor of the dashboard: looks at one run after the other in a thread of its own, for long runs take it long."""

import threading
import time
import traceback
from queue import SimpleQueue

from keel.diagnosis.doctor import diagnose
from keel.diagnosis.findings import Diagnosis
from keel.run.read.run import Run

SHARE = 0.1  # of the time, at most, that is spent on diagnosing one run


class Case:
    """What is known of one run, which may have gone on since."""

    def __init__(self) -> None:
        self.diagnosis: Diagnosis | None = None
        self.trouble = ""  # why there is none
        self.waiting: Run | None = None  # the run as it is to be looked at
        self.seen: Run | None = None  # the run as it was looked at
        self.again = 0.0  # not before

    @property
    def is_seen(self) -> bool:
        return self.seen is not None


class Doctor:
    """Takes cases as they come."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[Case] = SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def ask(self, case: Case, run: Run) -> None:
        """Look at the run when its turn comes, unless that was done, or was done a moment ago."""
        if case.waiting is None and case.seen is not run and time.monotonic() >= case.again:
            case.waiting = run
            self.queue.put(case)

    def _work(self) -> None:
        while True:
            case = self.queue.get()
            run, began = case.waiting, time.monotonic()
            assert run is not None
            case.trouble = self._look(case, run)
            now = time.monotonic()
            case.seen, case.waiting, case.again = run, None, now + (now - began) / SHARE

    def _look(self, case: Case, run: Run) -> str:
        try:
            case.diagnosis = diagnose(run)
        except Exception as error:  # noqa: BLE001 - a rule that stumbles over one run must not hide the others
            traceback.print_exc()
            return f"the doctor failed on this run: {type(error).__name__}"
        return ""
