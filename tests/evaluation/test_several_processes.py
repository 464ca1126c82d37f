"""Two processes evaluate, sample and test drift as one does; only the first writes. They wait as long as both live.

All cases run in one pair of processes, because interpreters start slowly.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import keel
from keel.config import DriftConfig, parse
from keel.evaluation.drift.drift import drift

from ..runs import settings

pytestmark = pytest.mark.slow  # more interpreters start

PATIENCE = 4.0  # seconds that a collective waits
REWARDS = """
import os, sys, time

def slow_on_held_out(prompts, completions):
    # The second process takes three times as long as a collective waits.
    if os.environ.get("RANK") == "1" and "w4 w5 w6 w7" in prompts:
        print("asleep", file=sys.stderr, flush=True)
        time.sleep(float(os.environ["SLEEP"]))
    return [float(text.count("w3")) for text in completions]

def length_of(completions):
    return [float(len(text.split())) for text in completions]

def count_w5(prompts, completions):
    return [None if prompt == "w3" else float(text.split().count("w5")) for prompt, text in zip(prompts, completions)]

def fails_at_last(prompts, completions):
    if "w4 w5 w6 w7" in prompts:
        raise ValueError("nothing is known of w7")
    return [0.0] * len(completions)
"""
PROGRAM = """
import json, os, sys, torch, keel
from keel.cli.main import main
from keel.config import DriftConfig, parse
from keel.errors import KeelError
from keel.evaluation.drift.drift import drift
torch.set_num_threads(1)
verbs = {"evaluate": lambda given: keel.evaluate(given).metrics, "sample": lambda given: keel.sample(given).rows,
         "drift": lambda given: drift(parse(DriftConfig, given)), "main": main,
         "train": lambda given: keel.train(given).metrics}
results = {}
for name, (verb, given) in json.loads(sys.argv[1]).items():
    try:
        results[name] = verbs[verb](given)
    except KeelError as error:
        results[name] = f"{type(error).__name__}: {error}"
with open(f"{sys.argv[2]}-{os.environ['RANK']}.json", "w") as file:
    json.dump(results, file)
"""
LINES = [{"prompt": "w1 w2", "topic": 1}, {"prompt": "w3", "topic": 2}, {"prompt": "w4 w5 w6 w7", "topic": 1}]


def start(count: int, command: list[str], **more: str) -> list[subprocess.Popen[str]]:
    """Start processes that find each other as under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    source = str(Path(keel.__file__).parents[1])
    shared = {"PYTHONPATH": source, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), **more}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def outputs(processes: list[subprocess.Popen[str]], seconds: float = 300) -> list[tuple[str, str]]:
    try:
        found = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [process.returncode for process in processes] == [0] * len(processes), found
    return found


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def inputs(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints that learned from a reward model with a range, prompts of it and others."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("inputs")
    model = AutoModelForSequenceClassification.from_pretrained(tiny_policy, num_labels=1)
    with torch.no_grad():
        model.score.weight.copy_(torch.linspace(-1, 1, 32).unsqueeze(0))
    model.save_pretrained(folder / "reward")
    AutoTokenizer.from_pretrained(tiny_policy).save_pretrained(folder / "reward")
    known = dict.fromkeys(("score_low", "score_median", "score_high", "score_std", "longest"), 0.0)
    (folder / "reward" / "range.json").write_text(json.dumps(known | {"score_lowest": 0.0, "score_highest": 1.0}))
    (folder / "rewards.py").write_text(REWARDS)
    write(folder / "few.jsonl", LINES)
    write(folder / "one.jsonl", LINES[:1])
    training = [{"prompt": f"w{i} w{j}", "kind": "ab"[i < 3]} for i in range(6) for j in range(9)]
    path = write(folder / "training.jsonl", training)
    new = [{"prompt": f"w2{i} w1{j} w2{i}", "kind": "c", "response": f"w{i} w{j}"} for i in range(7) for j in range(7)]
    write(folder / "today.jsonl", new)
    values = settings(tiny_policy, folder / "run", {"prompts": {"path": path}, "steps": 3})
    values |= {"rewards": [{"model": str(folder / "reward")}], "checkpoint": {"every": 1, "keep": 0}}
    keel.train({**values, "optim": {"learning_rate": 1e-2}})
    return folder


def cases(inputs: Path, policy: Path, other: Path, output: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """The verb and settings of each case, which writes into `output`."""
    few, code = {"prompts": {"path": str(inputs / "few.jsonl")}}, f"{inputs / 'rewards.py'}:"
    decoding = {"num_responses": 3, "max_response_tokens": 5, "batch_size": 4}
    rewards = [{"model": str(inputs / "reward"), "name": "rm"}, {"function": code + "count_w5"}]
    base = {"policy": str(policy), **few, "sampling": decoding, "rewards": rewards}
    against = {**base, "against": str(other), "output": str(output / "against.json"), "gate": "length>=0, prompts>=3"}
    run = {"run": str(inputs / "run"), "slices": ["kind"], "output": str(output / "drift.json")}
    today = str(inputs / "today.jsonl")
    return {
        "against": ("evaluate", {**against, "slices": ["topic"], "best_of": 3}),
        "one prompt": ("evaluate", {**base, "against": str(other), "prompts": {"path": str(inputs / "one.jsonl")}}),
        "one tempered": (
            "evaluate",
            {
                **base,
                "reference": str(other),
                "prompts": {"path": str(inputs / "one.jsonl")},
                "sampling": {**decoding, "top_k": 9},
            },
        ),
        "tempered": ("evaluate", {**base, "reference": str(other), "sampling": {**decoding, "temperature": 0.7}}),
        "several": ("evaluate", {**base, "policy": [str(policy), str(other)], "reference": str(other)}),
        "frontier": ("evaluate", {"checkpoints": str(inputs / "run"), **few, "sampling": decoding, "dtype": "float32"}),
        "pairs": (
            "evaluate",
            {**base, "against": str(other), "pairs": str(output / "pairs.jsonl"), "output": str(output / "pairs.json")},
        ),
        "sample": ("sample", {"model": str(policy), **few, "sampling": decoding, "output": str(output / "s.jsonl")}),
        "drift": ("drift", {**run, "prompts": {"path": today}}),
        "logged": ("drift", {**run, "answers": today, "output": str(output / "logged.json")}),
    }


def cases_of_two(inputs: Path, policy: Path, output: Path) -> dict[str, tuple[str, Any]]:
    """Cases of two processes only. The last prompt is the second one's."""
    code, few = f"{inputs / 'rewards.py'}:", str(inputs / "few.jsonl")
    base = {"policy": str(policy), "prompts": {"path": few}, "sampling": {"batch_size": 1}}
    changes = {"prompts": {"path": str(inputs / "training.jsonl")}, "steps": 1}
    train = settings(policy, output / "run", changes)
    train |= {"evaluate": {"prompts": few, "every": 1}, "rewards": [{"function": code + "slow_on_held_out"}]}
    return {
        "scorer": ("evaluate", {**base, "rewards": [{"function": code + "fails_at_last"}]}),
        "printed": ("main", ["evaluate", "--policy", str(policy), "--prompts.path", few]),
        "uneven": ("train", train),
    }


def run_alone(verb: str, given: dict[str, Any]) -> Any:
    match verb:
        case "evaluate":
            return keel.evaluate(given).metrics
        case "sample":
            return keel.sample(given).rows
    return drift(parse(DriftConfig, given))


Everything = dict[int, tuple[Path, list[dict[str, Any]], list[tuple[str, str]]]]


@pytest.fixture(scope="module")
def results(inputs: Path, tiny_policy: Path, tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Everything:
    """The folder, the results of every process and what each printed, by the number of processes."""
    folders = {count: tmp_path_factory.mktemp(f"of{count}") for count in (1, 2)}
    given = {count: cases(inputs, tiny_policy, tiny_gpt2, folder) for count, folder in folders.items()}
    alone = {name: run_alone(verb, settings) for name, (verb, settings) in given[1].items()}
    more = cases_of_two(inputs, tiny_policy, tmp_path_factory.mktemp("train"))
    command = ["-c", PROGRAM, json.dumps(given[2] | more), str(folders[2] / "result")]
    pair = start(2, command, KEEL_COLLECTIVE_SECONDS=str(PATIENCE), SLEEP=str(3 * PATIENCE))
    printed = outputs(pair)
    texts = [(folders[2] / f"result-{rank}.json").read_text() for rank in range(2)]
    return {
        1: (folders[1], [json.loads(json.dumps(alone))], []),
        2: (folders[2], [json.loads(text) for text in texts], printed),
    }


def same(expected: Any, found: Any, renamed: tuple[str, str], where: str = "") -> None:
    """Compare values; numbers may differ by rounding, and texts name another folder."""
    if isinstance(expected, dict):
        assert list(expected) == list(found), where
        for key, value in expected.items():
            same(value, found[key], renamed, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(expected) == len(found), where
        for number, (ours, theirs) in enumerate(zip(expected, found, strict=True)):
            same(ours, theirs, renamed, f"{where}[{number}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6, nan_ok=True), where
    else:
        assert found == (expected.replace(*renamed) if isinstance(expected, str) else expected), where


def test_the_results_are_the_same_in_both_processes(results: Everything) -> None:
    folder, [expected], _ = results[1]
    other, found, _ = results[2]
    for each in found:
        for name in expected:
            same(expected[name], each[name], (str(folder), str(other)), name)


def test_the_files_are_the_same(results: Everything) -> None:
    folder, two = results[1][0], results[2][0]
    names = sorted(path.name for path in folder.iterdir())
    assert sorted(path.name for path in two.iterdir() if not path.name.startswith("result-")) == names
    assert {"drift.rank.jsonl", "pairs.key.json", "against.gate.json", "s.jsonl"} <= set(names)
    for name in names:
        ours, theirs = ((each / name).read_text() for each in (folder, two))
        if name.endswith(".jsonl"):
            assert ours == theirs
        elif "gate" not in name:  # which has the time
            same(json.loads(ours), json.loads(theirs), (str(folder), str(two)), name)


def test_an_error_of_one_process_is_raised_on_all(results: Everything) -> None:
    found = results[2][1]
    assert found[0]["scorer"] == found[1]["scorer"]
    assert found[0]["scorer"].startswith("RewardError: ")
    assert "nothing is known of w7" in found[0]["scorer"]


def test_only_the_first_process_prints(results: Everything) -> None:
    _, found, [(shown, _), (silent, errors)] = results[2]
    assert [each["printed"] for each in found] == [0, 0]
    assert "3 prompts" in shown
    assert silent == ""
    assert errors == "asleep\n"


def test_an_evaluation_three_times_as_long_as_the_timeout_passes(results: Everything) -> None:
    first, second = (each["uneven"] for each in results[2][1])
    assert "evaluate/score" in first
    assert first["evaluate/score"] == second["evaluate/score"]


def test_a_process_killed_while_the_other_waits(inputs: Path, tiny_policy: Path) -> None:
    command = ["-m", "keel", "evaluate", "--policy", str(tiny_policy), "--prompts.path", str(inputs / "few.jsonl")]
    command += ["--reward-function", f"{inputs / 'rewards.py'}:slow_on_held_out"]
    first, second = start(2, command, KEEL_COLLECTIVE_SECONDS=str(PATIENCE), SLEEP="100")
    assert second.stderr is not None
    while "asleep" not in (line := second.stderr.readline()):
        assert line
    second.send_signal(signal.SIGKILL)
    second.communicate()
    began = time.monotonic()
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 75, errors
    assert time.monotonic() - began < 4 * PATIENCE
    assert "another process of this run is gone" in errors
