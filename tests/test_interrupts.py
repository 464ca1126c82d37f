"""Signals that ask a process to end: which are taken care of, when they act, and what is left alone."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from keel.errors import Interrupted
from keel.interrupts import (
    ALWAYS,
    BY_DEFAULT,
    KEYBOARD,
    interrupts_allowed,
    interrupts_blocked,
    interrupts_deferred,
    interrupts_handled,
    pending_interrupt,
)
from keel.progress import ProgressDisplay
from keel.terminal import print_line

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")

EVERY = pytest.mark.parametrize("number", [*ALWAYS, *BY_DEFAULT])


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    """As a process begins, whatever the tests' own runner ignores."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in BY_DEFAULT}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_these_are_the_signals() -> None:
    names = {number.name for number in (*ALWAYS, *BY_DEFAULT)}
    assert names == {"SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU", "SIGQUIT"}


def interrupted_by(number: signal.Signals, patience: Callable[[], AbstractContextManager[None]], times: int = 1) -> str:
    """What was done when the signal ended such a block, in which it came so many times."""
    done = "nothing"
    try:
        with interrupts_handled(), interrupts_deferred():
            with patience():
                for _ in range(times):
                    os.kill(os.getpid(), number)
                done = f"the block, {pending_interrupt()} waiting"
            done = "all"
    except Interrupted as error:
        assert str(error) == number.name  # noqa: PT017 - what it is beside what was done
        return done
    return f"{done}, uninterrupted"


@EVERY
def test_a_signal_waits_for_what_may_not_be_cut_short(number: signal.Signals) -> None:
    assert interrupted_by(number, interrupts_deferred) == "all"
    assert interrupted_by(number, interrupts_blocked) == "all"


@EVERY
def test_a_signal_acts_at_once_where_nothing_is_lost(number: signal.Signals) -> None:
    assert interrupted_by(number, interrupts_allowed) == "nothing"


def test_nothing_comes_after_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process in which a run was interrupted in a block that defers it lives on."""
    monkeypatch.setattr("keel.interrupts.GRACE_SECONDS", 0.2)
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("again"))
    assert interrupted_by(signal.SIGTERM, interrupts_deferred) == "all"
    time.sleep(0.5)
    signal.signal(signal.SIGTERM, before)
    assert heard == []


@pytest.mark.parametrize("number", sorted({*ALWAYS, *BY_DEFAULT} - {*KEYBOARD}))
def test_a_signal_that_comes_again_and_again_changes_nothing(number: signal.Signals) -> None:
    """As SIGXCPU does each second."""
    assert interrupted_by(number, interrupts_deferred, times=3) == "all"


@pytest.mark.parametrize("number", BY_DEFAULT)
def test_a_handler_of_the_callers_comes_first(number: signal.Signals) -> None:
    """Also none at all: what `nohup` ignores stays ignored."""
    heard = []
    signal.signal(number, lambda *_: heard.append(number))
    with interrupts_handled():
        os.kill(os.getpid(), number)
    assert heard == [number]
    signal.signal(number, signal.SIG_IGN)
    with interrupts_handled():
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) == signal.SIG_IGN


@EVERY
def test_afterwards_all_is_as_it_was(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with interrupts_handled(), interrupts_handled():
        assert signal.getsignal(number) != before
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_who_presses_the_key_again_does_not_wait(number: signal.Signals) -> None:
    code = f"""import signal, time
from keel.interrupts import interrupts_blocked, interrupts_handled
with interrupts_handled(), interrupts_blocked():
    signal.raise_signal({number:d})
    time.sleep(0.6)
    signal.raise_signal({number:d})"""
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 128 + number


class Gone:
    """What a closed terminal is to who writes on it."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.refused = 0

    def write(self, _: str) -> int:
        self.refused += 1
        raise OSError(5, "Input/output error")

    def flush(self) -> None:
        self.write("")

    def fileno(self) -> int:
        return 2

    def isatty(self) -> bool:
        return True


def test_nobody_has_to_read_what_a_run_says(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Gone()
    monkeypatch.setattr(sys, "stderr", terminal)
    print_line("a word")
    assert terminal.refused == 1
    with ProgressDisplay("sft", 2) as display:
        display.show(1, {"loss": 1.0})
        time.sleep(0.2)  # it draws itself again
        display.show(2, {"loss": 1.0})
    assert terminal.refused > 1
