"""Runs in a forked child, which a test may kill, stop or let fail at a named place."""

import json
import os
import shutil
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from keel.cli.main import main
from keel.run.checkpoint import latest_checkpoint
from keel.run.folder import RunFolder

from ..runs import PROMPTS, contents, lines, settings, without_clock

exhaustive = pytest.mark.exhaustive
needs_fork = pytest.mark.skipif(sys.platform == "win32", reason="forks")

REWARDS = '''
import time

def share_of_w3(completions, **_):
    """How much of the answer is the word w3."""
    return [words.count("w3") / max(1, len(words)) for words in map(str.split, completions)]

def slow(completions, **_):
    """The first two times (the self-check asks thrice, all answers and two halves) at once, then never."""
    slow.asked = getattr(slow, "asked", 0) + 1
    if slow.asked > 4:
        print("asked and waiting", flush=True)
        time.sleep(60)
    return share_of_w3(completions)
'''
RANKINGS = [{"prompt": f"w{i}", "responses": ["w3 w3", f"w{i} w4", "w5"], "ranks": [1, 2, 3]} for i in range(1, 13)]
EVERYTHING = {"algorithm.target_kl": 1.0, "algorithm.kl_horizon": 100.0, "reward.normalize": "running"}
VARIANTS: dict[str, dict[str, Any]] = {
    "ppo": {"algorithm.update_epochs": 2, "optim.schedule": "linear", **EVERYTHING},
    "shared critic": {"critic.sharing": "shared", **EVERYTHING},
    "a2c": {"algorithm.name": "a2c", **EVERYTHING},
    "rloo": {"algorithm.name": "rloo", "reward.normalize": "reference"},
    "lora": {"policy.lora": {"r": 4}, "optim.learning_rate": 1e-2},
}


@dataclass(frozen=True)
class Stage:
    """A run of a verb, in a folder of its own."""

    verb: str
    values: dict[str, Any]
    output: Path

    def arguments(self, resume: bool = False) -> list[str]:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        recipe = self.output.with_suffix(".yaml")
        recipe.write_text(yaml.safe_dump({**self.values, "output": str(self.output)}))
        return [self.verb, str(recipe), *(["--resume"] if resume else [])]

    def at(self, output: Path) -> "Stage":
        return Stage(self.verb, self.values, output)


def train_stage(model: Path, folder: Path, changes: dict[str, Any] | None = None) -> Stage:
    """Four steps of `keel train` with a checkpoint after every second one."""
    prompts, rewards = folder / "prompts.jsonl", folder / "rewards.py"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    rewards.write_text(REWARDS)
    fixed = {
        "steps": 4,
        "checkpoint.every": 2,
        "prompts.path": str(prompts),
        "rewards": [{"function": f"{rewards}:share_of_w3"}],
        "log.rollouts_per_step": 16,
        "evaluate": {"every": 1, "prompts": str(prompts)},
    }
    return Stage("train", settings(model, folder, {**fixed, **(changes or {})}), folder / "run")


def reward_stage(model: Path, folder: Path) -> Stage:
    return supervised_stage("reward", model, folder, RANKINGS)


def dpo_stage(model: Path, folder: Path) -> Stage:
    return supervised_stage("dpo", model, folder, RANKINGS)


def sft_stage(model: Path, folder: Path) -> Stage:
    return supervised_stage("sft", model, folder, [{"prompt": f"w{i}", "completion": "w3 w4"} for i in range(1, 13)])


def supervised_stage(verb: str, model: Path, folder: Path, rows: Sequence[Any]) -> Stage:
    """Five steps, with a checkpoint after every second one."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model": str(model),
        "data": {"path": str(data), "eval_fraction": 0.25},
        "batch_size": 4,
        "epochs": 2,
        "checkpoint": {"every": 2},
        "optim": {"learning_rate": 1e-3},
    }
    return Stage(verb, values, folder / "run")


STAGES: dict[str, Callable[[Path, Path], Stage]] = {
    "train": train_stage,
    "reward": reward_stage,
    "dpo": dpo_stage,
    "sft": sft_stage,
}


@dataclass
class Child:
    """A child at work. Its words, of both kinds, are in `log`."""

    pid: int
    log: Path

    def wait(self, seconds: float = 60.0) -> int:
        """Its exit code, or minus the signal that ended it. Fails the test when it does not end in time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        pytest.fail(f"still running after {seconds} s:\n{self.words}")

    def until(self, words: str, seconds: float = 60.0) -> None:
        """Wait until it says this."""
        deadline = time.monotonic() + seconds
        while words not in self.words:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                pytest.fail(f"never said {words!r}:\n{self.words}")
            time.sleep(0.005)

    def until_watching(self) -> None:
        """Wait until it takes care of signals itself."""
        status = Path(f"/proc/{self.pid}/status")
        while not int(status.read_text().partition("SigCgt:")[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1:
            time.sleep(0.001)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    @property
    def words(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def start(
    stage: Stage,
    resume: bool = False,
    failpoint: str | None = None,
    environment: Mapping[str, str] | None = None,
    place: Path | None = None,
) -> Child:
    """Run the stage in a child, which fails at the failpoint, in the working folder `place`."""
    arguments = stage.arguments(resume)
    environment = environment or {}
    log = stage.output.with_suffix(f".log{environment.get('RANK', '')}")
    log.write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
        pid = os.fork()
    if pid:
        return Child(pid, log)
    handle = os.open(log, os.O_WRONLY | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    code = 1
    try:
        sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - for the child's whole life
        torch.set_num_threads(1)
        os.environ.update(environment)
        if place is not None:
            os.chdir(place)
        if failpoint:
            os.environ["KEEL_FAILPOINT"] = failpoint
        code = main(arguments)
    finally:
        os._exit(code)


def start_pair(
    stage: Stage,
    resume: bool = False,
    failpoints: Mapping[int, str] | None = None,
    patience: float = 60.0,
    places: Sequence[Path | None] = (None, None),
) -> list[Child]:
    """Run the stage in two processes, which find each other as under torchrun.

    Each may fail at a failpoint, and have a working folder.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared["KEEL_COLLECTIVE_SECONDS"] = str(patience)
    return [
        start(
            stage,
            resume,
            (failpoints or {}).get(rank),
            shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            places[rank],
        )
        for rank in range(2)
    ]


def run(stage: Stage, resume: bool = False, failpoint: str | None = None) -> int:
    return start(stage, resume, failpoint).wait()


CLOCK = ("tokens_per_second",)


def same(one: Path, other: Path) -> None:
    """Both runs left the same weights, moments, counters and answers to the byte, and the same metrics but for time."""
    found, expected = (
        {name: data for name, data in contents(each).items() if last(each, name)} for each in (one, other)
    )
    assert sorted(found) == sorted(expected)
    different = [name for name in expected if found[name] != expected[name]]
    assert different == []
    metrics = [
        [
            {key: value for key, value in line.items() if not key.endswith(CLOCK)}
            for line in without_clock(lines(each / "metrics.jsonl"))
        ]
        for each in (one, other)
    ]
    assert metrics[0] == metrics[1]


def last(folder: Path, name: str) -> bool:
    """Of the checkpoints only the newest counts: a run that was stopped in between has one more."""
    newest = max((path.name for path in (folder / "checkpoints").iterdir()), default="")
    return not name.startswith("checkpoints/") or name.startswith(f"checkpoints/{newest}/")


def committed(stage: Stage) -> int:
    """The newest step under its final name, which must be one that can be used; 0 for none."""
    folder = RunFolder(stage.output)
    named = [int(path.name[5:]) for path in folder.checkpoints.glob("step-*") if path.suffix != ".tmp"]
    checkpoint = latest_checkpoint(folder)
    assert (0 if checkpoint is None else checkpoint.step) == max(named, default=0)
    return max(named, default=0)


def clear(stage: Stage) -> None:
    shutil.rmtree(stage.output, ignore_errors=True)
