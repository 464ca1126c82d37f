"""F-01, F-03: a run that is killed at any moment goes on from its last checkpoint, and ends as the run left alone."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from keel import failpoints

from .children import STAGES, VARIANTS, Stage, clear, committed, exhaustive, needs_fork, run, same, start, train_stage

pytestmark = [needs_fork, pytest.mark.slow]

OF_POLICY_LEARNING = {"step.sample", "step.score", "step.targets", "step.evaluate"}
SMOKE = [("train", place) for place in ("step.update:3", "log.appended:2", "save.content:2", "save.visible:2")]
KILLS = int(os.environ.get("KEEL_KILLS", "40"))


def places(stage: str) -> list[str]:
    """The failpoints that a stage passes, at a visit in the middle of the run where there are several."""
    third = ("step.", "update.")
    names = [name for name in failpoints.NAMES if stage == "train" or name not in OF_POLICY_LEARNING]
    visits = {name: 3 if name.startswith(third) else 2 if name.startswith(("save.", "log.")) else 1 for name in names}
    return [f"{name}:{visits[name]}" for name in names if name != "start.resumed"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> Any:
    """Each stage left alone, once."""
    ended: dict[str, Stage] = {}

    def get(name: str) -> Stage:
        if name not in ended:
            stage = STAGES[name](tiny_policy, tmp_path_factory.mktemp(name))
            assert run(stage) == 0
            ended[name] = stage
        return ended[name]

    return get


def trials() -> list[Any]:
    every = [(name, place) for name in STAGES for place in places(name)]
    return [pytest.param(*trial, marks=() if trial in SMOKE else exhaustive) for trial in every]


@pytest.mark.parametrize(("name", "place"), trials())
def test_f01_killed_at_every_named_place(name: str, place: str, straight: Any, tmp_path: Path) -> None:
    stage = straight(name).at(tmp_path / "killed")
    assert run(stage, failpoint=f"{place}=kill9") == -signal.SIGKILL, "it was never there"
    before = committed(stage)
    again = start(stage, resume=True)
    assert again.wait() == 0
    assert before == 0 or f"keel: continuing from step {before}" in again.words
    assert committed(stage) >= before
    same(stage.output, straight(name).output)


def test_every_failpoint_is_somewhere_in_these_tests() -> None:
    tried = {place.partition(":")[0] for name in STAGES for place in places(name)}
    assert tried | {"start.resumed"} == set(failpoints.NAMES)


@pytest.mark.parametrize(
    "name", ["train", *(pytest.param(name, marks=exhaustive) for name in ("reward", "dpo", "sft"))]
)
def test_f03_three_resumes_in_a_row(name: str, straight: Any, tmp_path: Path) -> None:
    stage = straight(name).at(tmp_path / "killed")
    for resume, failpoint in ((False, "step.update:4"), (True, "start.resumed"), (True, "step.log:1")):
        assert run(stage, resume, f"{failpoint}=kill9") == -signal.SIGKILL
    assert run(stage, resume=True) == 0
    same(stage.output, straight(name).output)


@exhaustive
@pytest.mark.parametrize("name", list(VARIANTS))
def test_f03_every_algorithm_goes_on_bit_for_bit(name: str, tiny_policy: Path, tmp_path: Path) -> None:
    whole = train_stage(tiny_policy, tmp_path, VARIANTS[name])
    assert run(whole) == 0
    for number, place in enumerate(("step.log:3", "step.update:4", "save.visible:2")):
        killed = whole.at(tmp_path / f"killed{number}")
        assert run(killed, failpoint=f"{place}=kill9") == -signal.SIGKILL
        assert run(killed, resume=True) == 0
        same(killed.output, whole.output)


@exhaustive
def test_f01_killed_at_random_times(straight: Any, tmp_path: Path) -> None:
    """KEEL_KILLS sets how often. Each time it goes on where it was, until it ends; then another run begins."""
    whole = straight("train")
    began = time.monotonic()
    assert run(whole.at(tmp_path / "timed")) == 0
    seconds = time.monotonic() - began
    stage, draw, kills, ended = whole.at(tmp_path / "killed"), random.Random(0), 0, 0
    while kills < KILLS:
        child = start(stage, resume=stage.output.exists())
        time.sleep(draw.uniform(0.0, 1.2 * seconds))
        child.send(signal.SIGKILL)
        if child.wait() == 0:
            same(stage.output, whole.output)
            clear(stage)
            ended += 1
        else:
            kills += 1
            committed(stage)
    assert ended > 0


def test_f01_an_unfinished_checkpoint_is_named_and_passed_over(straight: Any, tmp_path: Path) -> None:
    stage = straight("train").at(tmp_path / "killed")
    assert run(stage, failpoint="save.visible:2=kill9") == -signal.SIGKILL
    again = start(stage, resume=True)
    assert again.wait() == 0
    assert "keel: continuing from step 2; ignored step-000004.tmp: unfinished" in again.words


def test_f02_a_damaged_checkpoint_is_named_and_the_one_before_serves(straight: Any, tmp_path: Path) -> None:
    stage = straight("train").at(tmp_path / "killed")
    assert run(stage) == 0
    damaged = stage.output / "checkpoints" / "step-000004" / "weights.safetensors"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    again = start(stage, resume=True)
    assert again.wait() == 0
    assert "keel: continuing from step 2; ignored step-000004: weights.safetensors is damaged" in again.words
    same(stage.output, straight("train").output)
