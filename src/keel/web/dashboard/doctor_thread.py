"""A thread that diagnoses the runs of the dashboard one after the other, so that no request waits for a diagnosis."""

import threading
import time
import traceback
from dataclasses import dataclass
from queue import SimpleQueue

from keel.diagnosis.doctor import diagnose
from keel.diagnosis.findings import Diagnosis
from keel.run.read.run import Run

MAX_SHARE = 0.1  # of the time that may be spent on diagnosing one run


@dataclass(frozen=True, eq=False)
class DoctorResult:
    """What the doctor reported last about a run. It never changes, so any thread may read it."""

    run: Run | None = None  # the state of the run that was diagnosed; None: none yet
    diagnosis: Diagnosis | None = None
    trouble: str = ""  # why there is no diagnosis of this state; `diagnosis` is that of an earlier one


class RunDiagnosis:
    """The latest diagnosis of one run. The run may have continued since."""

    def __init__(self) -> None:
        self.result = DoctorResult()
        self.queued: Run | None = None  # the state of the run that is to be diagnosed
        self.next_time = 0.0  # time.monotonic() before which the run is not diagnosed again


class DoctorThread:
    """Diagnoses queued runs in order."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[RunDiagnosis] = SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def request(self, entry: RunDiagnosis, run: Run) -> None:
        """Queue a run, unless this state of it was diagnosed or the last diagnosis is too recent."""
        if entry.queued is None and entry.result.run is not run and time.monotonic() >= entry.next_time:
            entry.queued = run
            self.queue.put(entry)

    def _work(self) -> None:
        while True:
            entry = self.queue.get()
            run, began = entry.queued, time.monotonic()
            assert run is not None
            entry.result = self._diagnose(run, entry.result)
            now = time.monotonic()
            entry.next_time = now + (now - began) / MAX_SHARE
            entry.queued = None  # last: from here on, another thread may queue the run again

    def _diagnose(self, run: Run, previous: DoctorResult) -> DoctorResult:
        try:
            return DoctorResult(run, diagnose(run))
        except Exception as error:  # noqa: BLE001 - a rule that fails on one run must not stop the diagnosis of others
            traceback.print_exc()
            return DoctorResult(run, previous.diagnosis, f"the doctor failed on this run: {type(error).__name__}")
