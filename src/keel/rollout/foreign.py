"""What surrounds code that is not keel's while it runs: it may fail, take long, or change the process."""

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

from keel.terminal import tell

ResultT = TypeVar("ResultT")
SLOW_SECONDS = 30.0
"""A batch that takes longer is reported."""
SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGQUIT", "SIGXCPU", "SIGALRM")
    if hasattr(signal, name)
]


def _handlers() -> list[Any] | None:
    """Only the main thread can change them."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    return [signal.getsignal(number) for number in SIGNALS] if in_main_thread else None


def _set_handlers(handlers: list[Any] | None) -> None:
    for number, handler in zip(SIGNALS, handlers or (), strict=False):
        if handler is not None:  # not one of Python's
            signal.signal(number, handler)


def _alarm_pending() -> bool:
    """Whether a SIGALRM is to come: a function that failed before `signal.alarm(0)` would be interrupted later on."""
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
    except FileNotFoundError:  # somebody removed it
        return None


def _set_folder(folder: str | None) -> None:
    if folder is not None:
        with suppress(OSError):
            os.chdir(folder)


STATES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "the standard streams": (_streams, _set_streams),  # first, so that a line on the others is seen
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
"""What of the process keel depends on: how to read it, and how to set it. Random states are not among it: every random
stream of keel is a generator of its own."""

_reported: set[tuple[str, str]] = set()


@contextmanager
def process_kept(what: str) -> Iterator[None]:
    """After it the process is as before; what the code named `what` changed is reported once."""
    before = {name: read() for name, (read, _) in STATES.items()}
    try:
        yield
    finally:
        for name, (read, restore) in STATES.items():
            if read() != before[name]:
                restore(before[name])
                if (what, name) not in _reported:
                    _reported.add((what, name))
                    tell(f"warning: {what} changed {name}; keel changed it back")


@contextmanager
def reported_when_slow(what: str, fix: str) -> Iterator[None]:
    """Say once that it took longer than SLOW_SECONDS. (Afterwards: a thread that watched would make forks unsafe.)"""
    start = time.monotonic()
    yield
    seconds = time.monotonic() - start
    if seconds > SLOW_SECONDS and (what, "slow") not in _reported:
        _reported.add((what, "slow"))
        tell(f"{what} took {seconds:.0f} s for a batch, in which the run waited for it; {fix}")


class Deadline:
    """Runs a job in a thread, which is left behind when the job takes too long."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.left_behind: Future[Any] | None = None

    def run(self, job: Callable[[], ResultT]) -> ResultT:
        """The job's result, or what it raised. Raises TimeoutError after `seconds`, and as long as an earlier job
        still runs: two never run at once."""
        if self.left_behind is not None and not self.left_behind.done():
            raise TimeoutError(f"an earlier batch is still running after more than {self.seconds:g} s")
        result: Future[ResultT] = Future()
        context, with_gradients = copy_context(), torch.is_grad_enabled()

        def work() -> None:
            try:
                with torch.set_grad_enabled(with_gradients):
                    result.set_result(context.run(job))
            except BaseException as error:  # noqa: BLE001 - whoever waits for the result raises it
                result.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            return result.result(self.seconds)
        except TimeoutError:
            if result.done():  # its own
                raise
            self.left_behind = result
            raise TimeoutError(f"no scores within timeout_seconds, {self.seconds:g} s") from None


def error_line(error: BaseException, file: str | None) -> str:
    """The line of the file that the error passed last, such as ` (my.py:7)`."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" ({Path(str(file)).name}:{lines[-1]})" if lines else ""
