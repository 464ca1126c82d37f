"""Two processes do what one does: the same answers, the same gradients, the same record."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import keel
from keel.data.prompts import Prompt
from keel.run.folder import RunFolder
from keel.training.setup import prompts_of_step

from ..runs import PROMPTS, lines, settings, without_clock
from .processes import start_processes

PROGRAM = """
import json, sys, torch, keel
torch.set_num_threads(1)
for values in json.loads(sys.argv[1]):
    keel.train(values)
"""
REWARD = '''
def share_of_w3(prompts, completions):
    """Nothing is known of answers to w13."""
    nothing = float("nan")
    return [
        nothing if prompt == "w13" else text.split().count("w3") / 6 + len(text.split()) / 10
        for prompt, text in zip(prompts, completions)
    ]
'''
pytestmark = pytest.mark.slow  # two more interpreters start

WITH_UNKNOWN = ["w1", "w2 w3", "w13", "w13"]


def unlucky_seed() -> int:
    """In both steps the prompts w13 fall to the second process, and to it alone."""
    prompts = [Prompt(text, text, (), {}) for text in WITH_UNKNOWN]
    return next(
        seed
        for seed in range(1000)
        if all({prompt.text for prompt in prompts_of_step(prompts, seed, step, 4, 1)[2:]} == {"w13"} for step in (1, 2))
    )


RUNS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "whole": (
        PROMPTS,
        {"algorithm.minibatch_size": 16, "reward.normalize": "running", "algorithm.target_kl": 1.0},
    ),
    "minibatches": (PROMPTS, {"algorithm.minibatch_size": 4, "algorithm.update_epochs": 2}),
    "dropped": (
        WITH_UNKNOWN,
        {
            "seed": unlucky_seed(),
            "rollout.batch_size": 4,
            "algorithm.minibatch_size": 4,
            "reward.on_failure": "drop",
            "critic.sharing": "shared",
        },
    ),
}


def values_of(name: str, processes: int, model: Path, folder: Path) -> dict[str, Any]:
    texts, changes = RUNS[name]
    prompts, reward = folder / f"{name}.jsonl", folder / "mine.py"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    reward.write_text(REWARD)
    # A large eps keeps Adam from blowing the rounding of tiny gradients up to whole steps.
    fixed = {"optim.eps": 1e-3, "prompts.path": str(prompts), "log.rollouts_per_step": 2}
    rewards = {"rewards": [{"function": f"{reward}:share_of_w3"}]}
    return settings(model, folder / f"{name}-{processes}", {**fixed, **rewards, **changes})


def run_in_two_processes(all_values: list[dict[str, Any]]) -> None:
    """They find each other as under torchrun."""
    start_processes(2, [sys.executable, "-c", PROGRAM, json.dumps(all_values)])


@pytest.fixture(scope="module")
def folder(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run, once here and once in two processes."""
    folder = tmp_path_factory.mktemp("processes")
    for name in RUNS:
        keel.train(values_of(name, 1, tiny_policy, folder))
    run_in_two_processes([values_of(name, 2, tiny_policy, folder) for name in RUNS])
    return folder


@pytest.mark.parametrize("name", list(RUNS))
def test_the_same_metrics(name: str, folder: Path) -> None:
    one, two = (without_clock(lines(folder / f"{name}-{processes}" / "metrics.jsonl")) for processes in (1, 2))
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2]
    for ours, theirs in zip(one, two, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert theirs[key] == (value if value is None else pytest.approx(value, rel=1e-4, abs=1e-5)), key


@pytest.mark.parametrize("name", list(RUNS))
def test_the_same_answers(name: str, folder: Path) -> None:
    one, two = (lines(folder / f"{name}-{processes}" / "rollouts.jsonl") for processes in (1, 2))
    assert len(one) == 4
    assert [answer["response"] for answer in one] == [answer["response"] for answer in two]


@pytest.mark.parametrize("name", list(RUNS))
def test_the_same_weights(name: str, folder: Path) -> None:
    one, two = (RunFolder(folder / f"{name}-{processes}") for processes in (1, 2))
    for ours, theirs in ((one.policy, two.policy), (one.critic, two.critic)):
        expected, found = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6)


def test_a_process_may_lose_all_its_answers(folder: Path) -> None:
    """It goes on with nothing to learn from."""
    assert [line["reward/dropped"] for line in lines(folder / "dropped-2" / "metrics.jsonl")] == [0.5, 0.5]
