"""A thread that diagnoses the runs of the dashboard one after the other, so that no request waits for a diagnosis."""

import threading
import time
import traceback
from queue import SimpleQueue

from keel.diagnosis.doctor import diagnose
from keel.diagnosis.findings import Diagnosis
from keel.run.read.run import Run

MAX_SHARE = 0.1  # of the time that may be spent on diagnosing one run


class RunDiagnosis:
    """The latest diagnosis of one run. The run may have continued since."""

    def __init__(self) -> None:
        self.diagnosis: Diagnosis | None = None
        self.trouble = ""  # why there is no diagnosis
        self.queued: Run | None = None  # the state of the run that is to be diagnosed
        self.diagnosed: Run | None = None  # the state of the run that was diagnosed last
        self.next_time = 0.0  # time.monotonic() before which the run is not diagnosed again

    @property
    def is_done(self) -> bool:
        return self.diagnosed is not None


class DoctorThread:
    """Diagnoses queued runs in order."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[RunDiagnosis] = SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def request(self, entry: RunDiagnosis, run: Run) -> None:
        """Queue a run, unless this state of it was diagnosed or the last diagnosis is too recent."""
        if entry.queued is None and entry.diagnosed is not run and time.monotonic() >= entry.next_time:
            entry.queued = run
            self.queue.put(entry)

    def _work(self) -> None:
        while True:
            entry = self.queue.get()
            run, began = entry.queued, time.monotonic()
            assert run is not None
            entry.trouble = self._diagnose(entry, run)
            now = time.monotonic()
            entry.diagnosed, entry.queued, entry.next_time = run, None, now + (now - began) / MAX_SHARE

    def _diagnose(self, entry: RunDiagnosis, run: Run) -> str:
        try:
            entry.diagnosis = diagnose(run)
        except Exception as error:  # noqa: BLE001 - a rule that fails on one run must not stop the diagnosis of others
            traceback.print_exc()
            return f"the doctor failed on this run: {type(error).__name__}"
        return ""
