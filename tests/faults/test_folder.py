"""F-04, F-08, F-09, F-10, F-21, F-39: the run folder, the disk and the memory under a run."""

import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from keel.run.metrics_log import JsonlMetrics

from ..runs import lines
from .children import committed, exhaustive, needs_fork, run, same, start, train_stage

pytestmark = [needs_fork, pytest.mark.slow]

FULL = ["save.begin", "save.content", "save.manifest", "save.visible"]


@pytest.mark.parametrize("place", [*(f"{name}:2" for name in FULL), "log.append:5", "result.begin", "result.visible"])
@pytest.mark.parametrize("code", ["ENOSPC", *(pytest.param(code, marks=exhaustive) for code in ("EIO", "EROFS"))])
def test_f08_a_full_or_broken_disk_ends_with_5_and_loses_nothing(
    place: str, code: str, tiny_policy: Path, tmp_path: Path
) -> None:
    whole = train_stage(tiny_policy, tmp_path)
    assert run(whole) == 0
    stage = whole.at(tmp_path / "full")
    child = start(stage, failpoint=f"{place}=raise:{code}")
    assert child.wait() == 5
    last = child.words.strip().splitlines()[-1]
    assert os.strerror(getattr(errno, code)) in last
    assert last.endswith("-> free or repair the storage")
    assert committed(stage) >= (2 if place != "save.content:2" else 0)
    assert run(stage, resume=True) == 0
    same(stage.output, whole.output)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_f09_a_folder_that_cannot_be_written(tiny_policy: Path, tmp_path: Path) -> None:
    stage = train_stage(tiny_policy, tmp_path)
    stage.output.mkdir()
    stage.output.chmod(0o500)
    assert run(stage) == 2


def test_f09_a_folder_that_goes_away(tiny_policy: Path, tmp_path: Path) -> None:
    stage = train_stage(tiny_policy, tmp_path)
    child = start(stage, failpoint="step.update:3=sleep:1")
    child.until("failpoint")
    shutil.rmtree(stage.output)
    assert child.wait() == 5
    assert "metrics.jsonl: No such file or directory" in child.words


@pytest.mark.parametrize("name", ["with spaces", "ünïcode ☃", "x" * 200, "-dash", "'quote'"])
def test_f09_any_name_will_do(name: str, tiny_policy: Path, tmp_path: Path) -> None:
    stage = train_stage(tiny_policy, tmp_path, {"steps": 1}).at(tmp_path / name / "run")
    assert run(stage) == 0
    assert committed(stage) == 1


def test_f21_a_second_trainer_is_kept_out_and_a_killed_one_is_no_hindrance(tiny_policy: Path, tmp_path: Path) -> None:
    stage = train_stage(tiny_policy, tmp_path)
    first = start(stage, failpoint="step.update:3=sleep:60")
    first.until("failpoint")
    second = start(stage, resume=True)
    assert second.wait() == 2
    assert f"in use by process {first.pid} since" in second.words
    first.send(signal.SIGKILL)
    first.wait()
    assert run(stage, resume=True) == 0


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [("algorithm", "kl_coef", 0.5), ("optim", "learning_rate", 1e-4), ("", "seed", 1), ("rollout", "batch_size", 32)],
)
def test_f04_other_settings_are_refused_by_name(
    section: str, name: str, value: float, tiny_policy: Path, tmp_path: Path
) -> None:
    stage = train_stage(tiny_policy, tmp_path)
    assert run(stage, failpoint="step.update:3=kill9") == -signal.SIGKILL
    (stage.values[section] if section else stage.values)[name] = value
    child = start(stage, resume=True)
    assert child.wait() == 2
    assert f"{section}.{name} was".lstrip(".") in child.words


@pytest.mark.parametrize("changed", ["prompts.jsonl", "model"])
def test_f39_what_a_run_reads_may_not_change_under_it(changed: str, tiny_policy: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_policy, tmp_path / "model")
    stage = train_stage(tmp_path / "model", tmp_path)
    assert run(stage, failpoint="step.update:3=kill9") == -signal.SIGKILL
    file = tmp_path / changed
    with (file / "config.json" if file.is_dir() else file).open("ab") as opened:
        opened.write(b" \n")
    child = start(stage, resume=True)
    assert child.wait() == 2
    assert f"{changed}: has changed since the run began" in child.words


BROKEN = """
asked = []

def share_of_w3(completions, **_):
    asked.append(1)
    if len(asked) > 7:
        raise SystemExit(0)
    return [words.count("w3") / max(1, len(words)) for words in map(str.split, completions)]
"""


def test_f39_a_reward_function_may_be_mended(tiny_policy: Path, tmp_path: Path) -> None:
    stage = train_stage(tiny_policy, tmp_path)
    file = tmp_path / "rewards.py"
    right = file.read_text()
    file.write_text(BROKEN)
    child = start(stage)
    assert child.wait() == 4
    assert "reward function share_of_w3 (rewards.py:7): SystemExit: 0 -> fix the function, then --resume" in child.words
    steps = committed(stage)
    assert steps >= 1
    file.write_text(right)
    child = start(stage, resume=True)
    assert child.wait() == 0
    assert f"{file} has changed: the run continues, but will not be bit-identical" in child.words
    assert [line["step"] for line in lines(stage.output / "metrics.jsonl")] == [1, 2, 3, 4]


def test_f04_another_version_or_number_of_threads_is_said(tiny_policy: Path, tmp_path: Path) -> None:
    stage = train_stage(tiny_policy, tmp_path)
    assert run(stage, failpoint="step.update:3=kill9") == -signal.SIGKILL
    began = stage.output / "began.json"
    facts = json.loads(began.read_text())
    began.write_text(json.dumps({**facts, "machine": {**facts["machine"], "torch": "2.0.0"}}))
    child = start(stage, resume=True)
    assert child.wait() == 0
    assert "torch was 2.0.0" in child.words
    assert "will not be bit-identical" in child.words


def test_f10_memory_that_a_reward_function_cannot_have(tiny_policy: Path, tmp_path: Path) -> None:
    stage = train_stage(tiny_policy, tmp_path)
    rewards = tmp_path / "rewards.py"
    rewards.write_text(
        rewards.read_text() + "\ndef hungry(completions, **_):\n    import torch\n    torch.empty(2**60)\n"
    )
    stage.values["rewards"] = [{"function": f"{rewards}:hungry"}]
    child = start(stage)
    assert child.wait() == 4
    assert "reward function hungry (rewards.py:18): RuntimeError" in child.words


def test_f24_a_figure_that_is_no_number_is_null(tmp_path: Path) -> None:
    log = JsonlMetrics(tmp_path / "metrics.jsonl")
    log.log(1, {"a": float("nan"), "b": float("-inf"), "c": sys.float_info.max})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "a": None, "b": None, "c": sys.float_info.max}]
