"""Signals that ask the process to end: SIGTERM, Ctrl-C, a closed terminal's SIGHUP, and what schedulers send.

They end a run where it can be resumed exactly. A block that changes weights or files runs with interrupts deferred (a
signal waits for its end, at most `GRACE_SECONDS`) or blocked (a signal waits for its end). Everywhere else a signal
acts at once. A second Ctrl-C or SIGQUIT ends the process immediately.
"""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType
from typing import Any

from keel.errors import Interrupted

GRACE_SECONDS = 5.0
TOGETHER_SECONDS = 0.5  # one Ctrl-C can reach a process twice, from the terminal and from its parent
ALWAYS = (signal.SIGINT, signal.SIGTERM)
BY_DEFAULT = (
    tuple(  # taken over only where they would end the process: `nohup` and a program of the caller's come first
        getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGXCPU", "SIGQUIT") if hasattr(signal, name)
    )
)
KEYS = (signal.SIGINT, getattr(signal, "SIGQUIT", signal.SIGINT))  # which a person presses again who will not wait


class _Watch:
    """The signal that came, when it came, and how long the current block may make it wait."""

    def __init__(self) -> None:
        self.before: dict[signal.Signals, Any] = {}  # the handlers outside; empty while no signal is handled
        self.timers: list[threading.Timer] = []  # that come back when patience has ended
        self.forget()

    def forget(self) -> None:
        self.caught: signal.Signals | None = None
        self.since = self.patience = 0.0

    def receive(self, number: int, _: FrameType | None) -> None:
        waited = time.monotonic() - self.since
        if self.caught is None:
            self.caught, self.since = signal.Signals(number), time.monotonic()
            _say(f"{self.caught.name}: stopping")
        elif number in KEYS and waited > TOGETHER_SECONDS:
            _say("stopped at once")
            os._exit(128 + number)
        self.act()

    def act(self) -> None:
        """Interrupt if patience has ended; else, if it ever will, come back then."""
        if self.caught is None:
            return
        left = self.since + self.patience - time.monotonic()
        if left <= 0:
            raise Interrupted(self.caught.name)
        if math.isfinite(left):
            again = threading.Timer(left, signal.pthread_kill, (threading.main_thread().ident, signal.SIGTERM))
            again.daemon = True
            again.start()
            self.timers.append(again)

    def restore(self) -> None:
        """Restore the previous signal handlers, and cancel timers: one that fired afterwards would end the process."""
        for timer in self.timers:
            timer.cancel()
        self.timers = []
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


_watch = _Watch()
if hasattr(os, "register_at_fork"):  # a child of a reward function is no run
    os.register_at_fork(after_in_child=_watch.restore)


@contextmanager
def interrupts_handled() -> Iterator[None]:
    """Handle signals inside the block. Does nothing in a thread, or inside another such block."""
    if _watch.before or not _in_main_thread() or sys.platform == "win32":
        yield
        return
    _watch.forget()
    ending = [number for number in BY_DEFAULT if signal.getsignal(number) == signal.SIG_DFL]
    _watch.before = {number: signal.getsignal(number) for number in (*ALWAYS, *ending)}
    try:
        for number in _watch.before:
            signal.signal(number, _watch.receive)
        yield
    finally:
        _watch.restore()


def interrupts_deferred() -> AbstractContextManager[None]:
    """Inside, a signal waits for the end of the block, at most GRACE_SECONDS."""
    return _patient(GRACE_SECONDS)


def interrupts_blocked() -> AbstractContextManager[None]:
    """Inside, a signal waits for the end of the block."""
    return _patient(math.inf)


def interrupts_allowed() -> AbstractContextManager[None]:
    """Inside, a signal acts at once; a pending one acts at the start."""
    return _patient(0.0)


def clear_interrupt() -> None:
    """Forget the signal that came: it has been dealt with, and must end nothing else."""
    _watch.caught = None


def pending_interrupt() -> str | None:
    """Return the name of the signal that has come, or None."""
    return _watch.caught.name if _watch.before and _watch.caught is not None else None


@contextmanager
def _patient(seconds: float) -> Iterator[None]:
    if not _watch.before or not _in_main_thread():
        yield
        return
    before, _watch.patience = _watch.patience, seconds
    try:
        _watch.act()
        yield
    finally:
        _watch.patience = before
    _watch.act()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _say(what: str) -> None:
    with suppress(OSError):  # whoever listened may be gone
        os.write(2, f"\nkeel: {what}\n".encode())
