"""SIGTERM and SIGINT (Ctrl-C) end a run at a place from which it goes on exactly.

What changes weights or files is `held`: a signal waits for its end, though not for long; or `sealed`: it waits for the
end however long that takes. Everywhere else a signal acts at once. A second Ctrl-C ends the process there and then.
"""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

from keel.errors import Interrupted

GRACE_SECONDS = 5.0
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Watch:
    """The signal that came, when it came, and how long what goes on may make it wait."""

    active = False
    caught: signal.Signals | None = None
    since = 0.0
    patience = 0.0

    def receive(self, number: int, _: FrameType | None) -> None:
        if self.caught is None:
            self.caught, self.since = signal.Signals(number), time.monotonic()
            os.write(2, f"\nkeel: {self.caught.name}: stopping\n".encode())
            self.act()
        elif number == signal.SIGINT:
            os.write(2, b"\nkeel: stopped at once\n")
            os._exit(130)

    def act(self) -> None:
        """Interrupt now, or set an alarm for when patience ends."""
        if self.caught is None:
            return
        left = self.since + self.patience - time.monotonic()
        if left <= 0:
            self.interrupt()
        signal.setitimer(signal.ITIMER_REAL, 0 if math.isinf(left) else left)

    def interrupt(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert self.caught is not None
        raise Interrupted(self.caught.name)


_watch = _Watch()


@contextmanager
def watched() -> Iterator[None]:
    """Within it signals are taken care of; nothing happens in a thread, or inside another such block."""
    if _watch.active or threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
        yield
        return
    before = [signal.signal(number, _watch.receive) for number in SIGNALS]
    alarm = signal.signal(signal.SIGALRM, _watch.interrupt)
    _watch.active, _watch.caught, _watch.patience = True, None, 0.0
    try:
        yield
    finally:
        _watch.active = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip((*SIGNALS, signal.SIGALRM), (*before, alarm), strict=True):
            signal.signal(number, handler)


def held() -> AbstractContextManager[None]:
    """A signal waits for the end, at most GRACE_SECONDS."""
    return _patient(GRACE_SECONDS)


def sealed() -> AbstractContextManager[None]:
    """A signal waits for the end."""
    return _patient(math.inf)


def interruptible() -> AbstractContextManager[None]:
    """A signal acts at once, also one that has been waiting."""
    return _patient(0.0)


def waiting() -> str | None:
    """The signal that has come, or None."""
    return _watch.caught.name if _watch.active and _watch.caught is not None else None


@contextmanager
def _patient(seconds: float) -> Iterator[None]:
    if not _watch.active or threading.current_thread() is not threading.main_thread():
        yield
        return
    before, _watch.patience = _watch.patience, seconds
    try:
        _watch.act()
        yield
    finally:
        _watch.patience = before
    _watch.act()
