"""Several processes train the policy that one trains: the same responses, metrics and weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from keel.data.prompts import Prompt
from keel.run.folder import RunFolder
from keel.training.prompt_order import draw_prompts

from ..runs import PROMPTS, lines, settings, without_clock
from .processes import Step, run, run_in_processes

REWARD = '''
def share_of_w3(prompts, completions):
    """Nothing is known of answers to w13."""
    nothing = float("nan")
    return [
        nothing if prompt == "w13" else text.split().count("w3") / 6 + len(text.split()) / 10
        for prompt, text in zip(prompts, completions)
    ]

def w5_is_solved(prompts, completions):
    rows = zip(prompts, completions)
    return [1.0 if prompt == "w5" else sum(ord(letter) for letter in text) / 1000 for prompt, text in rows]
'''
pytestmark = pytest.mark.slow  # two more interpreters start

WITH_UNKNOWN = ["w1", "w2 w3", "w13", "w13"]


def unlucky_seed() -> int:
    """In both steps the prompts w13 fall to the second process, and to it alone."""
    prompts = [Prompt(text, text, (), {}) for text in WITH_UNKNOWN]
    return next(
        seed
        for seed in range(1000)
        if all({prompt.text for prompt in draw_prompts(prompts, seed, first, 4)[2:]} == {"w13"} for first in (0, 4))
    )


RUNS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "whole": (
        PROMPTS,
        {"algorithm.minibatch_size": 12, "reward.normalize": "running", "algorithm.target_kl": 1.0},
    ),
    "minibatches": (
        PROMPTS,  # twelve optimizer steps and more, over which the rounding of sums in another order grows
        {"algorithm.minibatch_size": 4, "algorithm.update_epochs": 2, "optim.learning_rate": 1e-3},
    ),
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
    "tied": (PROMPTS, {"algorithm.microbatch_tokens": 20, "policy.gradient_checkpointing": True}),
    "adapter": (PROMPTS, {"policy.lora": {"r": 2}, "critic.sharing": "shared", "algorithm.microbatch_tokens": 20}),
    "evaluated": (  # the first process has two batches of an evaluation, the second one
        PROMPTS,
        {
            "critic.sharing": "shared",
            "evaluate.every": 1,
        },
    ),
    "groups": (PROMPTS, {"algorithm.name": "grpo", "rollout.group_size": 2, "rollout.batch_size": 24}),
    "resampling": (
        PROMPTS,
        {
            "algorithm.name": "grpo",
            "rollout.group_size": 2,
            "rollout.batch_size": 24,
            "rollout.resample_rounds": 3,
            "algorithm.kl_coef": 0.0,
        },
    ),
    "responses": (
        PROMPTS,
        {
            "algorithm.name": "grpo",
            "rollout.group_size": 2,
            "rollout.batch_size": 24,
            "algorithm.ratio_level": "sequence",
            "algorithm.loss_aggregation": "sequence",
        },
    ),
}
IN_PAIR = [pytest.param(name, 2, id=f"{name}, 2") for name in RUNS]
IN_MORE = [
    pytest.param(name, count, id=f"{name}, {count}", marks=pytest.mark.exhaustive)
    for name in RUNS
    for count in (3, 4)
    if name != "dropped"  # four responses
]

Run = Callable[[str, int], Path]


@pytest.fixture(scope="module")
def step_of(tiny_policy: Path, tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Step]:
    folder = tmp_path_factory.mktemp("processes")

    def step(name: str, output: str, changes: dict[str, Any] | None = None, **events: bool) -> Step:
        texts, of_run = RUNS[name]
        prompts, reward = folder / f"{name}.jsonl", folder / "mine.py"
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        reward.write_text(REWARD)
        # With a large eps, Adam does not turn the rounding of tiny gradients into full steps.
        fixed: dict[str, Any] = {
            "rollout.batch_size": 12,
            "optim.eps": 1e-3,
            "prompts.path": str(prompts),
            "log.rollouts_per_step": 2,
        }
        function = "w5_is_solved" if name == "resampling" else "share_of_w3"
        rewards = {"rewards": [{"function": f"{reward}:{function}"}]}
        if "evaluate.every" in of_run:
            held_out = folder / "held out.jsonl"
            held_out.write_text("".join(json.dumps({"prompt": f"w{i}"}) + "\n" for i in range(14, 23)))
            fixed["evaluate.prompts"] = str(held_out)
        model = tiny_gpt2 if name == "tied" else tiny_policy
        values = settings(model, folder / output, {**fixed, **rewards, **of_run, **(changes or {})})
        return {"verb": "train", "values": values, **events}

    return step


@pytest.fixture(scope="module")
def output(step_of: Callable[..., Step]) -> Run:
    """Return the output of a run in a number of processes. The first call for a number starts all runs in as many."""
    outputs: dict[int, dict[str, Path]] = {}

    def output_of(name: str, count: int) -> Path:
        if count not in outputs:
            steps = {each: step_of(each, f"{each}-{count}") for each in RUNS if each != "dropped" or count < 3}
            run(list(steps.values())) if count == 1 else run_in_processes(count, list(steps.values()))
            outputs[count] = {each: Path(step["values"]["output"]) for each, step in steps.items()}
        return outputs[count][name]

    return output_of


def require_same_run(one: Path, other: Path, steps: list[int]) -> None:
    """Responses equal, metrics to 1e-4 relative, weights to 1e-5."""
    ours, theirs = (without_clock(lines(folder / "metrics.jsonl")) for folder in (one, other))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == steps
    for expected, found in zip(ours, theirs, strict=True):
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert found[key] == (value if value is None else pytest.approx(value, rel=1e-4, abs=1e-5)), key
    texts = [[line["response"] for line in lines(folder / "rollouts.jsonl")] for folder in (one, other)]
    assert len(texts[0]) == 2 * len(steps)
    assert texts[0] == texts[1]
    results = [path.relative_to(one) for path in RunFolder(one).policy.parent.rglob("*model.safetensors")]
    assert results
    for result in results:
        weights, others = load_file(one / result), load_file(other / result)
        assert weights.keys() == others.keys()
        for key, value in weights.items():
            torch.testing.assert_close(others[key], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "count"), IN_PAIR + IN_MORE)
def test_several_processes_train_what_one_trains(name: str, count: int, output: Run) -> None:
    require_same_run(output(name, 1), output(name, count), [1, 2])


@pytest.mark.exhaustive
def test_two_processes_then_four_then_one_train_what_one_trains(step_of: Callable[..., Step]) -> None:
    longer = {"steps": 5}
    straight, resumed = step_of("whole", "straight", longer), step_of("whole", "resumed", longer)
    run([straight])
    run_in_processes(2, [{**resumed, "interrupt": True}])  # each interruption comes in the second step of a process
    run_in_processes(4, [{**resumed, "interrupt": True, "resume": True}])
    run([{**resumed, "resume": True}])
    require_same_run(*(Path(each["values"]["output"]) for each in (straight, resumed)), [1, 2, 3, 4, 5])


def test_a_process_may_have_nothing_to_sample_again(output: Run) -> None:
    """The last round of the first step samples one group, so only one of the processes does."""
    first, _ = lines(output("resampling", 2) / "metrics.jsonl")
    assert (first["resample/rounds"], first["resample/responses"]) == (2.0, 32.0)


def test_a_process_may_lose_all_its_responses(output: Run) -> None:
    assert [line["reward/dropped"] for line in lines(output("dropped", 2) / "metrics.jsonl")] == [0.5, 0.5]
