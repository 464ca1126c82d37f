"""Run code of the user, such as reward functions: it may fail, take long, or change the state of the process."""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import copy_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from keel.terminal import print_line

ResultT = TypeVar("ResultT")
SLOW_SECONDS = 30.0
"""Slower batches are reported."""
SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGQUIT", "SIGXCPU", "SIGALRM")
    if hasattr(signal, name)
]


def _handlers() -> list[Any] | None:
    # Only the main thread can set signal handlers.
    in_main_thread = threading.current_thread() is threading.main_thread()
    return [signal.getsignal(number) for number in SIGNALS] if in_main_thread else None


def _set_handlers(handlers: list[Any] | None) -> None:
    for number, handler in zip(SIGNALS, handlers or (), strict=False):
        if handler is not None:  # None is a handler that Python did not set and cannot restore
            signal.signal(number, handler)


def _alarm_pending() -> bool:
    """Return whether a SIGALRM is pending.

    A function that failed before it called `signal.alarm(0)` leaves one, which would interrupt the run later.
    """
    return hasattr(signal, "getitimer") and signal.getitimer(signal.ITIMER_REAL)[0] > 0


def _set_alarm_pending(pending: bool) -> None:
    if not pending:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _streams() -> tuple[Any, Any]:
    return sys.stdout, sys.stderr


def _set_streams(streams: tuple[Any, Any]) -> None:
    sys.stdout, sys.stderr = streams


def _folder() -> str | None:
    try:
        return str(Path.cwd())
    except FileNotFoundError:  # the folder was removed
        return None


def _set_folder(folder: str | None) -> None:
    if folder is not None:
        with suppress(OSError):
            os.chdir(folder)


STATES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "the standard streams": (_streams, _set_streams),  # first, so that the warnings about the others are visible
    "the working directory": (_folder, _set_folder),
    "the handlers of signals": (_handlers, _set_handlers),
    "the alarm": (_alarm_pending, _set_alarm_pending),
    "torch's gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": (torch.get_default_device, torch.set_default_device),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch's precision of products": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "torch's deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
}
"""The process state that keel depends on: how to read and how to set each. Global random states are not needed, since
every random stream of keel has a separate generator."""

_reported: set[tuple[str, str]] = set()


@contextmanager
def process_state_restored(what: str) -> Iterator[None]:
    """Restore the process state afterwards, and report once what the code named `what` had changed."""
    initial = {name: read() for name, (read, _) in STATES.items()}
    try:
        yield
    finally:
        for name, (read, restore) in STATES.items():
            if read() != initial[name]:
                restore(initial[name])
                if (what, name) not in _reported:
                    _reported.add((what, name))
                    print_line(f"warning: {what} changed {name}; keel changed it back")


@contextmanager
def reported_when_slow(what: str, fix: str) -> Iterator[None]:
    """Report once, afterwards, that the code named `what` took longer than SLOW_SECONDS."""
    # A thread that watched while the code runs would make forks in it unsafe.
    start = time.monotonic()
    yield
    seconds = time.monotonic() - start
    if seconds > SLOW_SECONDS and (what, "slow") not in _reported:
        _reported.add((what, "slow"))
        print_line(f"{what} took {seconds:.0f} s for a batch, while the run waited for it; {fix}")


class Deadline:
    """Runs jobs in a thread, and abandons the thread when a job takes too long."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.abandoned: Future[Any] | None = None

    def run(self, job: Callable[[], ResultT]) -> ResultT:
        """Run the job, and return its result or raise its exception.

        Raises TimeoutError after `seconds`, and as long as an abandoned job still runs: two jobs never run at once.
        """
        if self.abandoned is not None and not self.abandoned.done():
            raise TimeoutError(f"an earlier batch is still running after more than {self.seconds:g} s")
        result: Future[ResultT] = Future()
        context, with_gradients = copy_context(), torch.is_grad_enabled()

        def work() -> None:
            try:
                with torch.set_grad_enabled(with_gradients):
                    result.set_result(context.run(job))
            except BaseException as error:  # noqa: BLE001 - the waiting thread raises it
                result.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            return result.result(self.seconds)
        except TimeoutError:
            if result.done():  # the job itself raised a TimeoutError
                raise
            self.abandoned = result
            raise TimeoutError(f"no scores within timeout_seconds, {self.seconds:g} s") from None


def error_line(error: BaseException, file: str | None) -> str:
    """Return the last line of the file in the error's traceback, such as ` (my.py:7)`; empty if there is none."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" ({Path(str(file)).name}:{lines[-1]})" if lines else ""
