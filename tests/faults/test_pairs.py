"""F-03, F-06, F-07: two processes go on together, and stop together."""

import signal
import time
from pathlib import Path

import pytest

from .children import EVERYTHING, Child, committed, exhaustive, needs_fork, same, start_pair, train_stage

pytestmark = [needs_fork, pytest.mark.slow]


def codes(pair: list[Child], seconds: float = 60.0) -> list[int]:
    return [child.wait(seconds) for child in pair]


def test_f03_a_killed_pair_goes_on_bit_for_bit(tiny_policy: Path, tmp_path: Path) -> None:
    whole = train_stage(tiny_policy, tmp_path, EVERYTHING)
    assert codes(start_pair(whole)) == [0, 0]
    killed = whole.at(tmp_path / "killed")
    everywhere = "step.update:4=kill9"
    assert codes(start_pair(killed, failpoints={0: everywhere, 1: everywhere})) == [-signal.SIGKILL] * 2
    assert committed(killed) == 2
    assert codes(start_pair(killed, resume=True)) == [0, 0]
    same(killed.output, whole.output)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=exhaustive)])
def test_f06_a_signal_to_one_stops_both(number: signal.Signals, tiny_policy: Path, tmp_path: Path) -> None:
    whole = train_stage(tiny_policy, tmp_path, EVERYTHING)
    assert codes(start_pair(whole)) == [0, 0]
    stopped = whole.at(tmp_path / "stopped")
    pair = start_pair(stopped, failpoints={1: "step.score:3=sleep:1"})
    pair[1].until("failpoint")
    pair[1].send(number)
    assert codes(pair, 10.0) == [75, 75]
    assert committed(stopped) == 3
    assert codes(start_pair(stopped, resume=True)) == [0, 0]
    same(stopped.output, whole.output)


LATER = [pytest.param(place, marks=exhaustive) for place in ("start.loaded", "step.sample:3", "step.log:3")]


@pytest.mark.parametrize("place", ["step.update:3", *LATER])
def test_f06_when_one_dies_the_other_stops(place: str, tiny_policy: Path, tmp_path: Path) -> None:
    stage = train_stage(tiny_policy, tmp_path)
    pair = start_pair(stage, failpoints={1: f"{place}=kill9"}, patience=10.0)
    assert codes(pair) == [75, -signal.SIGKILL]
    assert "another process of this run is gone" in pair[0].words.strip().splitlines()[-1]
    assert committed(stage) == (0 if place == "start.loaded" else 2)


def test_f07_when_one_hangs_the_other_stops(tiny_policy: Path, tmp_path: Path) -> None:
    stage = train_stage(tiny_policy, tmp_path)
    pair = start_pair(stage, failpoints={1: "step.sample:3=sleep:60"}, patience=5.0)
    pair[1].until("failpoint")
    pair[1].send(signal.SIGSTOP)
    began = time.monotonic()
    assert pair[0].wait() == 75
    assert time.monotonic() - began < 20
    pair[1].send(signal.SIGKILL)
    pair[1].wait()
    assert committed(stage) == 2


def test_a_loss_that_is_not_finite_in_one_process_stops_both(tiny_policy: Path, tmp_path: Path) -> None:
    stage = train_stage(tiny_policy, tmp_path)
    assert codes(start_pair(stage, failpoints={1: "update.loss:3=nan"})) == [3, 3]
