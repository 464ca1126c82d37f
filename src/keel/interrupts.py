"""Handle signals that ask the process to end: SIGTERM, Ctrl-C, SIGHUP of a closed terminal, those of schedulers.

A signal ends a run only where it can be resumed exactly. In a block that changes weights or files, interrupts are
deferred (a signal waits for the end of the block, at most `GRACE_SECONDS`) or blocked (it waits without a limit).
Everywhere else a signal acts immediately. A second Ctrl-C or SIGQUIT ends the process immediately.
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
# One Ctrl-C can reach a process twice, from the terminal and from its parent. Both count as one.
TOGETHER_SECONDS = 0.5
ALWAYS = (signal.SIGINT, signal.SIGTERM)
# Handled only where their handler is the default, which ends the process: `nohup` and calling programs set others.
BY_DEFAULT = tuple(
    getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGXCPU", "SIGQUIT") if hasattr(signal, name)
)
KEYBOARD = (signal.SIGINT, getattr(signal, "SIGQUIT", signal.SIGINT))
"""signals from the keyboard; a second one ends the process without waiting"""


class _Watch:
    """State of the signal handling: the pending signal, its time, and how long the current block may delay it."""

    def __init__(self) -> None:
        self.previous: dict[signal.Signals, Any] = {}  # handlers to restore; empty while no signal is handled
        self.timers: list[threading.Timer] = []  # each sends the signal again when the delay has ended
        self.forget()

    def forget(self) -> None:
        self.caught: signal.Signals | None = None
        self.since = self.patience = 0.0

    def receive(self, number: int, _: FrameType | None) -> None:
        waited = time.monotonic() - self.since
        if self.caught is None:
            self.caught, self.since = signal.Signals(number), time.monotonic()
            _print_line(f"{self.caught.name}: stopping")
        elif number in KEYBOARD and waited > TOGETHER_SECONDS:
            _print_line("stopped immediately")
            os._exit(128 + number)
        self.act()

    def act(self) -> None:
        """Raise Interrupted if the delay of the pending signal has ended. Otherwise start a timer for its end."""
        if self.caught is None:
            return
        left = self.since + self.patience - time.monotonic()
        if left <= 0:
            raise Interrupted(self.caught.name)
        if math.isfinite(left):
            # A signal to the main thread, because only there an exception interrupts the run.
            timer = threading.Timer(left, signal.pthread_kill, (threading.main_thread().ident, signal.SIGTERM))
            timer.daemon = True
            timer.start()
            self.timers.append(timer)

    def restore(self) -> None:
        """Restore the previous signal handlers, and cancel timers: one that fires later would end the process."""
        for timer in self.timers:
            timer.cancel()
        self.timers = []
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}


_watch = _Watch()
if hasattr(os, "register_at_fork"):  # a process that a reward function forks must not handle signals as a run
    os.register_at_fork(after_in_child=_watch.restore)


@contextmanager
def interrupts_handled() -> Iterator[None]:
    """Handle signals inside the block. Has no effect in a thread or inside another such block."""
    # Python sets signal handlers in the main thread only; Windows has no pthread_kill, which the timers need.
    if _watch.previous or not _in_main_thread() or sys.platform == "win32":
        yield
        return
    _watch.forget()
    ending = [number for number in BY_DEFAULT if signal.getsignal(number) == signal.SIG_DFL]
    _watch.previous = {number: signal.getsignal(number) for number in (*ALWAYS, *ending)}
    try:
        for number in _watch.previous:
            signal.signal(number, _watch.receive)
        yield
    finally:
        _watch.restore()


def interrupts_deferred() -> AbstractContextManager[None]:
    """Delay signals to the end of the block, at most GRACE_SECONDS."""
    return _delay(GRACE_SECONDS)


def interrupts_blocked() -> AbstractContextManager[None]:
    """Delay signals to the end of the block, however long it takes."""
    return _delay(math.inf)


def interrupts_allowed() -> AbstractContextManager[None]:
    """Let signals act immediately inside the block. A pending signal acts at its start."""
    return _delay(0.0)


def clear_interrupt() -> None:
    """Discard the pending signal, because the caller has handled it."""
    _watch.caught = None


def pending_interrupt() -> str | None:
    """Return the name of the pending signal, or None."""
    return _watch.caught.name if _watch.previous and _watch.caught is not None else None


@contextmanager
def _delay(seconds: float) -> Iterator[None]:
    if not _watch.previous or not _in_main_thread():
        yield
        return
    outer_patience, _watch.patience = _watch.patience, seconds
    try:
        _watch.act()  # a signal that an outer block delays acts here, if this block allows it
        yield
    finally:
        _watch.patience = outer_patience
    _watch.act()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _print_line(text: str) -> None:
    # Not print(), which raises RuntimeError if the signal has interrupted another print() to the same stream.
    with suppress(OSError):  # standard error may be closed
        os.write(2, f"\nkeel: {text}\n".encode())
