"""F-41 to F-45: a process dies at every failpoint, the machines share no folder, a checkpoint lacks a file."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import transformers.models.llama.modeling_llama  # noqa: F401

# The forked children would each import these otherwise, which takes longer than their runs.
import keel.cli.train
import keel.training.policy
from keel import failpoints
from keel.loop import open_run

from ..runs import lines
from .children import EVERYTHING, Child, Stage, committed, exhaustive, needs_fork, same, start, start_pair, train_stage

pytestmark = [needs_fork, pytest.mark.slow]

PATIENCE = 120.0
"""seconds that a process waits for another one: the tests may share the machine with others"""
PATIENCE_OF_SURVIVOR = 20.0
"""the same where one dies: outside of an update, nothing but its heartbeat tells"""
BY_MAIN = ("log.", "save.begin", "save.manifest", "save.visible", "save.old", "save.done", "result.")
"""failpoints that the main process alone passes"""
TWO_STEPS = {"steps": 2, "checkpoint.every": 1, "algorithm.minibatch_size": 16}
"""two losses and two gradients in each step: of policy and critic"""
SMOKE = {"update.loss", "update.optimizer"}
PROGRAM = """
import os, sys
if os.environ["RANK"] == os.environ["VICTIM"] and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    os.environ["KEEL_FAILPOINT"] = os.environ["PLACE"] + "=kill9"
import torch
torch.set_num_threads(1)
from keel.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def codes(pair: list[Child]) -> list[int]:
    return [child.wait(300.0) for child in pair]


def run_pair(stage: Stage, resume: bool = False, failpoints: dict[int, str] | None = None) -> list[int]:
    return codes(start_pair(stage, resume, failpoints, PATIENCE_OF_SURVIVOR if failpoints else PATIENCE))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path) -> Stage:
    """A run of two processes without a fault: two steps, a checkpoint after each."""
    stage = train_stage(tiny_policy, tmp_path_factory.mktemp("pair"), {**TWO_STEPS, **EVERYTHING})
    assert run_pair(stage) == [0, 0]
    return stage


def place_of(name: str) -> str:
    """A visit after the first checkpoint, where the failpoint has one."""
    if name.startswith(("start.", "result.")):
        return name
    return f"{name}:{3 if name in ('update.loss', 'update.gradient') else 2}"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SMOKE else exhaustive) for name in failpoints.NAMES]
)
def test_f41_one_of_two_dies_at_a_failpoint(name: str, straight: Stage, tmp_path: Path) -> None:
    stage = straight.at(tmp_path / "killed")
    resume = name == "start.resumed"
    if resume:
        assert run_pair(stage, failpoints={1: "step.update:2=kill9"}) == [75, -signal.SIGKILL]
    victim = 0 if name.startswith(BY_MAIN) else 1
    ended = run_pair(stage, resume, {victim: f"{place_of(name)}=kill9"})
    assert ended[victim] == -signal.SIGKILL, "it was never there"
    # The last one has nothing more to wait for.
    assert ended[1 - victim] in ((0, 75) if name == "result.done" else (75,))
    before = committed(stage)
    assert run_pair(stage, resume=True) == [0, 0]
    assert committed(stage) >= before
    same(stage.output, straight.output)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "update.loss" else exhaustive) for name in failpoints.NAMES]
)
def test_f41_torchrun_starts_all_again_after_one_has_died(name: str, straight: Stage, tmp_path: Path) -> None:
    stage, program = straight.at(tmp_path / "killed"), tmp_path / "program.py"
    if name == "start.resumed":
        assert run_pair(stage, failpoints={1: "step.update:2=kill9"}) == [75, -signal.SIGKILL]
    program.write_text(PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {
        "PYTHONPATH": str(Path(keel.training.policy.__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
        "KEEL_COLLECTIVE_SECONDS": str(PATIENCE),
        "VICTIM": "0" if name.startswith(BY_MAIN) else "1",
        "PLACE": place_of(name),
    }
    ended = subprocess.run(
        [*torchrun, "--max-restarts", "1", str(program), *stage.arguments(resume=True)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert ended.stderr.count(f"failpoint {name}: kill9") == 1
    same(stage.output, straight.output)


def test_f42_machines_without_a_shared_folder_start_nothing(
    straight: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_run, "SHARED_PAUSE", 0.01)
    places = [tmp_path / "one", tmp_path / "other"]
    for place in places:
        place.mkdir()
    # The output is relative, and each process has a working folder of its own, like a local disk.
    stage = RelativeStage(straight.verb, straight.values, tmp_path / "run")
    pair = start_pair(stage, patience=PATIENCE, places=places)
    assert codes(pair) == [2, 2]
    for child in pair:
        assert "does not see the files of process 0 in this folder -> choose an output" in last_line(child)
    assert not list(tmp_path.rglob("step-*"))


class RelativeStage(Stage):
    """A stage whose output is a path relative to the working folder."""

    def arguments(self, resume: bool = False) -> list[str]:
        return [*super().arguments(resume), "--output", "here"]


def last_line(child: Child) -> str:
    return child.words.strip().splitlines()[-1]


@pytest.fixture
def copied(straight: Stage, tmp_path: Path) -> Stage:
    """A copy of the finished run."""
    stage = straight.at(tmp_path / "run")
    shutil.copytree(straight.output, stage.output)
    return stage


def test_f43_a_checkpoint_that_lacks_the_file_of_a_process_is_ignored(copied: Stage, straight: Stage) -> None:
    name = "weights-00001.safetensors"
    (copied.output / "checkpoints" / "step-000002" / name).unlink()
    pair = start_pair(copied, resume=True, patience=PATIENCE)
    assert codes(pair) == [0, 0]
    assert f"keel: continuing from step 1; ignored step-000002: {name} is missing" in pair[0].words
    same(copied.output, straight.output)


def test_f44_another_number_of_processes_resumes_and_reports_it(copied: Stage, straight: Stage) -> None:
    shutil.rmtree(copied.output / "checkpoints" / "step-000002")
    alone = start(copied, resume=True)
    assert alone.wait(300.0) == 0
    assert "processes was 2, is 1: the run continues, but will not be bit-identical" in alone.words
    for one, other in zip(*(lines(stage.output / "metrics.jsonl") for stage in (copied, straight)), strict=True):
        assert one["loss/policy"] == pytest.approx(other["loss/policy"], rel=1e-3, abs=1e-6)


@exhaustive
def test_f45_nan_on_one_process_stops_all(straight: Stage, tmp_path: Path) -> None:
    stage = straight.at(tmp_path / "run")
    assert run_pair(stage, failpoints={1: "update.loss:3=nan"}) == [3, 3]
    assert committed(stage) in (0, 1)
