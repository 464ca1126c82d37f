"""Wait for other processes of a run for any time, as long as they are alive.

A collective has a timeout, so it cannot wait for work whose length differs by process: slow scorers, an evaluation,
the main process that saves a model. Each process therefore counts in the store of the process group, from a thread. A
process that waits watches the counters of the others.
"""

import atexit
import threading
import time
from contextlib import suppress
from typing import Any

from keel.errors import ProcessLost
from keel.interrupts import pending_interrupt

LOST_FIX = "start all processes again, a training run with --resume"
LONGEST_PAUSE = 1.0
"""seconds between two beats, or less if the patience is short"""
PAUSES_WHEN_STOPPING = 10
"""beats that a process may miss once a signal has arrived: torchrun ends the others after it has lost a process"""


class Heartbeats:
    """The heartbeat of this process, and its view of the others.

    Args:
        store: the store of the process group (torch.distributed.Store).
        patience: seconds without a beat after which a process counts as lost.
    """

    def __init__(self, store: Any, rank: int, size: int, patience: float) -> None:
        self.store, self.rank, self.size, self.patience = store, rank, size, patience
        self.pause = min(LONGEST_PAUSE, patience / 8)
        self.num_waits = 0
        self._ended = threading.Event()
        # The thread has a connection to the store of its own: another call on this one may block for long.
        self._thread = threading.Thread(target=self._beat, args=(store.clone(),), name="keel-heartbeat", daemon=True)
        self._thread.start()
        atexit.register(self.leave)

    def wait_for_all(self) -> None:
        """Return when every process has made this call as often as this one. A collective must follow.

        The collective keeps the process that holds the store from leaving before the others have seen the last arrival.
        Raises ProcessLost when another process has left or has no heartbeat, RuntimeError when the store is gone.
        """
        self.num_waits += 1
        # Nobody arrives again before all have arrived, so one counter is enough for all waits.
        expected, arrived = self.num_waits * self.size, self.store.add("keel/arrived", 1)
        start = last = time.monotonic()
        beats, silence = [-1] * self.size, [0.0] * self.size
        while arrived < expected:
            time.sleep(min(0.5, self.pause, max(0.001, (time.monotonic() - start) / 20)))
            now = time.monotonic()
            if now - last >= self.pause:
                self._require_life(beats, silence, min(now - last, 2 * self.pause))  # less if this process was stopped
                last = now
            arrived = self.store.add("keel/arrived", 0)

    def leave(self) -> None:
        """Report that this process ends, so that no other one waits for it."""
        self._ended.set()
        self._thread.join(self.pause)
        with suppress(RuntimeError):  # the process that holds the store may have left before
            self.store.add("keel/left", 1)

    def _beat(self, store: Any) -> None:
        with suppress(RuntimeError):  # the store is gone, which this process notices at its next call of another one
            while not self._ended.wait(self.pause):
                store.add(f"keel/beats/{self.rank}", 1)

    def _require_life(self, beats: list[int], silence: list[float], elapsed: float) -> None:
        """Update the counters and the seconds without a beat of each process. Raises ProcessLost."""
        if self.store.add("keel/left", 0):
            raise _loss("another process of this run is gone: it has ended")
        patience = (
            self.patience if pending_interrupt() is None else min(self.patience, PAUSES_WHEN_STOPPING * self.pause)
        )
        for rank in range(self.size):
            count = self.store.add(f"keel/beats/{rank}", 0)
            silence[rank] = 0.0 if count != beats[rank] else silence[rank] + elapsed
            beats[rank] = count
            if silence[rank] > patience and rank != self.rank:
                raise _loss(f"another process of this run is gone: process {rank} has been silent for {patience:.0f} s")


def _loss(what: str) -> ProcessLost:
    return ProcessLost(what, "torchrun", LOST_FIX)
