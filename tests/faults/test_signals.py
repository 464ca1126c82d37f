"""F-05: signals that ask a run to end do so within seconds, in any phase, and it goes on as if nothing had been."""

import os
import pty
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import keel
from keel.cli.main import main
from keel.run.checkpoint import latest_checkpoint
from keel.run.folder import RunFolder

from ..runs import lines
from .children import STAGES, Child, committed, exhaustive, needs_fork, run, same, start, train_stage

pytestmark = [needs_fork, pytest.mark.slow]

SECONDS = 10.0
BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
OTHERS = [signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU, signal.SIGQUIT]
# What goes on when the signal comes, and the step that is saved then.
PHASES = {
    "start-up": ("start.loaded=sleep:60", 0),
    "sampling": ("step.sample:4=sleep:60", 3),
    "scoring": ("step.score:4=sleep:60", 3),
    "targets": ("step.targets:4=sleep:60", 3),
    "update": ("step.update:3=sleep:1", 3),
    "logging": ("step.log:3=sleep:1", 3),
    "saving": ("save.content:2=sleep:1", 2),
    "a long update": ("step.update:4=sleep:60", 2),  # given up: the last checkpoint has to do
}


def phases() -> list[Any]:
    smoke = [("sampling", signal.SIGTERM), ("update", signal.SIGINT), ("targets", signal.SIGUSR1)]
    every = [(phase, number) for phase in PHASES for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    every += [(phase, number) for phase in ("targets", "update") for number in OTHERS if number != signal.SIGHUP]
    return [pytest.param(*trial, marks=() if trial in smoke else exhaustive) for trial in every]


@pytest.mark.parametrize(("phase", "number"), phases())
def test_f05_in_every_phase(phase: str, number: signal.Signals, tiny_policy: Path, tmp_path: Path) -> None:
    whole = train_stage(tiny_policy, tmp_path)
    assert run(whole) == 0
    failpoint, step = PHASES[phase]
    stopped = whole.at(tmp_path / "stopped")
    child = start(stopped, failpoint=failpoint)
    child.until("failpoint")
    began = time.monotonic()
    child.send(number)
    assert child.wait() == 75
    assert time.monotonic() - began < SECONDS
    last = child.words.strip().splitlines()[-1]
    assert last == f"keel: interrupted by {number.name} -> continue with --resume"
    assert committed(stopped) == step
    assert run(stopped, resume=True) == 0
    same(stopped.output, whole.output)


@BOTH
def test_f05_while_a_scorer_is_awaited(number: signal.Signals, tiny_policy: Path, tmp_path: Path) -> None:
    rewards = {"rewards": [{"function": f"{tmp_path / 'rewards.py'}:slow"}]}
    stage = train_stage(tiny_policy, tmp_path, rewards)
    child = start(stage)
    child.until("asked and waiting")
    child.send(number)
    assert child.wait(SECONDS) == 75
    assert committed(stage) == 1


@BOTH
def test_f05_while_it_evaluates(number: signal.Signals, tiny_policy: Path, tmp_path: Path) -> None:
    """The step before is finished, and written down once the run goes on."""
    whole = train_stage(tiny_policy, tmp_path)
    assert run(whole) == 0
    stopped = whole.at(tmp_path / "stopped")
    child = start(stopped, failpoint="step.evaluate:3=sleep:60")
    child.until("failpoint")
    child.send(number)
    assert child.wait(SECONDS) == 75
    assert committed(stopped) == 3
    assert len(lines(stopped.output / "metrics.jsonl")) == 2
    assert run(stopped, True, "step.log:1=kill9") == -signal.SIGKILL
    assert run(stopped, True, "step.update:1=kill9") == -signal.SIGKILL
    assert len(lines(stopped.output / "metrics.jsonl")) == 3
    assert run(stopped, resume=True) == 0
    same(stopped.output, whole.output)


def test_f11_a_scorer_that_fails_in_an_evaluation_loses_no_step(tiny_policy: Path, tmp_path: Path) -> None:
    rewards = {"rewards": [{"function": f"{tmp_path / 'rewards.py'}:slow"}]}
    whole = train_stage(tiny_policy, tmp_path, rewards)
    file = tmp_path / "rewards.py"
    file.write_text(file.read_text().replace("time.sleep(60)", "raise ValueError('gone')"))
    child = start(whole)
    assert child.wait() == 4
    assert "gone" in child.words
    assert committed(whole) == 1


@BOTH
@pytest.mark.parametrize("name", [*(pytest.param(name, marks=exhaustive) for name in ("reward", "dpo")), "sft"])
def test_f05_other_stages(name: str, number: signal.Signals, tiny_policy: Path, tmp_path: Path) -> None:
    whole = STAGES[name](tiny_policy, tmp_path)
    assert run(whole) == 0
    stopped = whole.at(tmp_path / "stopped")
    child = start(stopped, failpoint="step.update:3=sleep:1")
    child.until("failpoint")
    child.send(number)
    assert child.wait(SECONDS) == 75
    assert committed(stopped) == 3
    assert run(stopped, resume=True) == 0
    same(stopped.output, whole.output)


def test_f05_a_terminal_that_is_closed(tiny_policy: Path, tmp_path: Path) -> None:
    """The run finishes its step and saves it, though nobody can read its words any more."""
    whole = train_stage(tiny_policy, tmp_path)
    assert run(whole) == 0
    stopped = whole.at(tmp_path / "stopped")
    arguments = stopped.arguments()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
        pid, terminal = pty.fork()
    if not pid:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 - for the child's whole life
        torch.set_num_threads(1)
        os.environ["KEEL_FAILPOINT"] = "step.update:3=sleep:1"
        os._exit(main(arguments))
    words = b""
    while b"failpoint" not in words:
        words += os.read(terminal, 1000)
    os.close(terminal)
    assert Child(pid, tmp_path / "none").wait(SECONDS) == 75
    assert committed(stopped) == 3
    assert run(stopped, resume=True) == 0
    same(stopped.output, whole.output)


@exhaustive
@BOTH
def test_f05_while_libraries_are_imported(number: signal.Signals, tiny_policy: Path, tmp_path: Path) -> None:
    """An import may turn the interrupt into an error of its own; it is an interrupt all the same."""
    stage = train_stage(tiny_policy, tmp_path)
    environment = os.environ | {"PYTHONPATH": str(Path(keel.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "import sys, keel.cli.main as m; print('here', flush=True); sys.exit(m.main())"]
    for tenths in range(1, 20, 3):
        process = subprocess.Popen(
            [*command, *stage.arguments()], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        time.sleep(tenths / 10)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 75, errors
        assert f"keel: interrupted by {number.name} -> continue with --resume" in errors


def test_f05_a_second_ctrl_c_ends_it_at_once(tiny_policy: Path, tmp_path: Path) -> None:
    stage = train_stage(tiny_policy, tmp_path)
    child = start(stage, failpoint="save.visible:2=sleep:60")
    child.until("failpoint")
    child.send(signal.SIGINT)
    child.until("stopping")
    time.sleep(0.6)  # sooner, it could be the same Ctrl-C
    child.send(signal.SIGINT)
    assert child.wait(2.0) == 130
    assert committed(stage) == 2
    found = latest_checkpoint(RunFolder(stage.output))
    assert found is not None
    assert found.ignored == ("step-000004.tmp: unfinished",)


@exhaustive
def test_f05_the_result_is_written_to_the_end(tiny_policy: Path, tmp_path: Path) -> None:
    """A signal in the last second of a run: nothing is left to interrupt."""
    stage = train_stage(tiny_policy, tmp_path)
    child = start(stage, failpoint="result.visible=sleep:1")
    child.until("failpoint")
    child.send(signal.SIGTERM)
    assert child.wait(SECONDS) in (0, 75)
    assert (stage.output / "policy" / "model.safetensors").is_file()


def test_f05_verbs_that_cannot_go_on_say_130(tiny_policy: Path, tmp_path: Path) -> None:
    stage: Any = train_stage(tiny_policy, tmp_path)
    values = {"model": str(tiny_policy), "prompts": stage.values["prompts"], "sampling": {"max_response_tokens": 200}}
    sample = type(stage)("sample", values, tmp_path / "answers.jsonl")
    child = start(sample)
    child.until_watching()
    child.send(signal.SIGTERM)
    assert child.wait(SECONDS) == 130
