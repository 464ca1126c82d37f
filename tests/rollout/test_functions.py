"""Reward functions are code of somebody else: what they are handed, how they may fail, and what they cannot change."""

import asyncio
import io
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from keel.config import RewardSource, parse
from keel.errors import ConfigError, RewardError
from keel.rollout.function_scorer import FunctionScorer
from keel.rollout.reward_file import RewardFolder
from keel.rollout.score import score
from keel.rollout.scorers import build_scorers, check_signatures

from .answers import answers, tokenizer_of, words

TOKENIZER, TWO = words("yes", "yes yes")


def scorer(function: Callable[..., Any]) -> FunctionScorer:
    (built,) = build_scorers([], [function])
    assert isinstance(built, FunctionScorer)
    return built


# ---- copies ----------------------------------------------------------------------------------------------------------


def test_what_a_function_changes_changes_nothing_of_the_run() -> None:
    chat: Any = [{"role": "user", "content": "Hello", "parts": [{"text": "a"}]}]
    columns = {"facts": {"known": ["x"]}}
    tokenizer = tokenizer_of(["Hello", "please"])
    rollouts = answers(tokenizer, [[3, 1], [3, 1]], [columns, columns], content=chat)
    seen: list[Any] = []

    def greedy(prompts: Any, completions: Any, completion_ids: Any, facts: Any, segments: Any) -> list[float]:
        seen.append((len(prompts[1]), prompts[1][0]["content"], facts[1], completion_ids[1], segments[1]))
        prompts[0].extend(completions[0])
        prompts[0][0]["content"] = "other"
        prompts[0][0]["parts"].clear()
        facts[0]["known"].append("y")
        completion_ids[0].clear()
        segments[0].clear()
        completions.clear()
        return [0.0, 0.0]

    parts = [[" please"], [" please"]]
    for _ in range(2):
        scorer(greedy)(rollouts, parts)
    assert seen == [(1, "Hello", {"known": ["x"]}, [3, 1], [" please"])] * 2
    assert chat == [{"role": "user", "content": "Hello", "parts": [{"text": "a"}]}]
    assert columns == {"facts": {"known": ["x"]}}
    assert parts == [[" please"], [" please"]]


def test_rows_of_a_group_share_nothing() -> None:
    """They have one prompt; a function that builds each dialogue in place sees each of them once."""
    rollouts = answers(tokenizer_of(["Hi", "a"]), [[3, 1]] * 3, content=[{"role": "user", "content": "Hi"}])

    def dialogue(prompts: Any, completions: Any) -> list[float]:
        for prompt, completion in zip(prompts, completions, strict=True):
            prompt.extend(completion)
        return [float(len(prompt)) for prompt in prompts]

    assert scorer(dialogue)(rollouts, None) == [2.0, 2.0, 2.0]


# ---- parameters ------------------------------------------------------------------------------------------------------


def takes_responses(responses: list[str]) -> list[float]:
    return [0.0 for _ in responses]


def takes_answer(completions: list[str], answer: list[str]) -> list[float]:
    return [float(text.strip() == right) for text, right in zip(completions, answer, strict=True)]


def takes_nothing() -> list[float]:
    return [0.0, 0.0]


def only_optional(responses: Any = None) -> list[float]:
    return [0.0, 0.0]


def takes_segments(completions: list[str], segments: list[list[str]]) -> list[float]:
    return [0.0 for _ in completions]


@pytest.mark.parametrize(
    ("function", "columns", "named"),
    [
        (takes_responses, ["id", "topic"], "takes `responses`"),
        (takes_answer, ["id"], "takes `answer`"),
        (takes_nothing, [], "takes none"),
        (only_optional, [], "takes none"),
        (takes_segments, [], "takes `segments`"),
    ],
)
def test_a_parameter_that_keel_does_not_pass_is_refused_at_load(
    function: Callable[..., Any], columns: list[str], named: str
) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        check_signatures([scorer(function)], columns)
    assert caught.value.where == "scorers[0]"
    for name in ("`prompts`", "`completions`", "`completion_ids`", *columns):
        assert name in caught.value.what
    with pytest.raises(RewardError, match=named):  # where columns come with each request, as in keel serve-reward
        scorer(function)(TWO, None)


@pytest.mark.parametrize(
    ("functions", "where"),
    [(takes_answer, "scorers"), ("rewards.py:score", "scorers"), ([takes_answer, "rewards.py:score"], "scorers[1]")],
    ids=["one function", "a text", "a list with a text"],
)
def test_what_is_no_list_of_functions_is_refused(functions: Any, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_scorers([], functions)
    assert caught.value.where == where


def test_parameters_that_are_given_pass() -> None:
    check_signatures([scorer(takes_answer)], ["answer"])
    check_signatures([scorer(takes_segments)], [], segments=True)
    check_signatures([scorer(lambda completions, responses=None: [0.0])], [])


def test_a_parameter_by_position_is_refused() -> None:
    def by_place(completions: list[str], /) -> list[float]:
        return [0.0 for _ in completions]

    with pytest.raises(ConfigError, match="`completions` by position"):
        scorer(by_place)


def test_a_column_with_the_name_of_an_argument_is_refused() -> None:
    with pytest.raises(ConfigError, match="`completions`"):
        check_signatures([scorer(takes_answer)], ["answer", "completions"])


def test_every_call_gets_all_columns_of_the_data() -> None:
    """Also a batch of rows that have none of a sparse one."""
    built = scorer(takes_answer)
    check_signatures([built], ["answer"])
    assert built(TWO, None) == [0.0, 0.0]


class Judge:
    def __call__(self, completions: list[str]) -> list[float]:
        return [1.0 for _ in completions]


def test_objects_and_partial_functions_have_a_name() -> None:
    from functools import partial

    built = build_scorers([], [Judge(), partial(takes_answer, answer=["yes"] * 2), lambda completions: [2.0] * 2])
    assert [each.name for each in built] == ["Judge", "takes_answer", "lambda"]
    assert [each(TWO, None) for each in built] == [[1.0, 1.0], [1.0, 0.0], [2.0, 2.0]]


# ---- what TRL passes besides the data --------------------------------------------------------------------------------


def test_the_signature_that_trl_documents() -> None:
    def logs(completions: Any, trainer_state: Any, log_extra: Any = None, log_metric: Any = None) -> list[float]:
        lengths = [len(text.split()) for text in completions]
        log_extra("words", lengths)
        log_metric("mean_words", sum(lengths) / len(lengths))
        return [float(trainer_state.global_step / trainer_state.max_steps)] * len(completions)

    built = scorer(logs)
    built.progress = (3, 12)
    scored = score(TWO, [built], TOKENIZER)
    assert scored.scores.tolist() == [0.25, 0.25]
    assert scored.columns == {"words": [1, 2]}
    assert scored.logged == {"mean_words": [1.5]}


def test_logging_too_few_values_is_an_error() -> None:
    def logs(completions: Any, log_extra: Any) -> list[float]:
        log_extra("words", [1])
        return [0.0 for _ in completions]

    with pytest.raises(RewardError, match="expected 2 values, got 1"):
        scorer(logs)(TWO, None)


# ---- failures --------------------------------------------------------------------------------------------------------


class PanicException(BaseException):
    """As pyo3 raises for a panic of a library written in Rust: no Exception."""


@pytest.mark.parametrize("error", [PanicException("index out of bounds"), SystemExit(3), GeneratorExit("odd")])
def test_whatever_a_function_raises_is_an_error_of_the_scorer(error: BaseException) -> None:
    def fails(completions: Any) -> list[float]:
        raise error

    with pytest.raises(RewardError, match=rf"fails \(test_functions\.py:\d+\): {type(error).__name__}"):
        scorer(fails)(TWO, None)


class Unreadable(float):
    def __float__(self) -> float:
        raise OSError("not loaded")


@pytest.mark.parametrize("scores", [[Unreadable(1.0)] * 2, torch.ones(2).to_sparse()], ids=["number", "tensor"])
def test_scores_that_cannot_be_read_are_an_error_of_the_scorer(scores: Any) -> None:
    with pytest.raises(RewardError) as caught:
        scorer(lambda completions: scores)(TWO, None)
    assert caught.value.where.startswith("reward function lambda")


def test_the_first_cause_is_known_where_responses_are_dropped() -> None:
    def fails(completions: Any) -> list[float]:
        raise KeyError("ground_truth")

    def odd(completions: Any) -> list[float]:
        return [1.0, float("nan")]

    scored = score(TWO, build_scorers([], [fails, odd]), TOKENIZER, on_failure="drop")
    assert not scored.kept.any()
    assert scored.failures.keys() == {"fails", "odd"}
    assert "KeyError: 'ground_truth'" in scored.failures["fails"]
    assert "sample 1" in scored.failures["odd"]


# ---- deadlines -------------------------------------------------------------------------------------------------------

SLEEPS = """
import asyncio, time
def sleeps(completions): time.sleep(60)
async def waits(completions): await asyncio.sleep(60)
async def blocks(completions): time.sleep(60)
def quick(completions): return [1.0 for _ in completions]
"""


@pytest.mark.parametrize("name", ["sleeps", "waits", "blocks"])
def test_a_deadline_is_kept(tmp_path: Path, name: str) -> None:
    file = tmp_path / "slow.py"
    file.write_text(SLEEPS)
    built = build_scorers([RewardSource(function=f"{file}:{name}", timeout_seconds=0.3)])
    start = time.monotonic()
    with pytest.raises(RewardError, match="timeout_seconds"):
        score(TWO, built, TOKENIZER)
    with pytest.raises(RewardError, match="still running"):  # two batches never run at once
        score(TWO, built, TOKENIZER)
    assert time.monotonic() - start < 20


def test_a_function_that_is_quick_enough(tmp_path: Path) -> None:
    file = tmp_path / "slow.py"
    file.write_text(SLEEPS)
    (built,) = build_scorers([RewardSource(function=f"{file}:quick", timeout_seconds=30)])
    assert built(TWO, None) == [1.0, 1.0]


def test_a_reward_model_has_no_deadline() -> None:
    with pytest.raises(ConfigError, match="timeout_seconds"):
        parse(RewardSource, {"model": "m", "timeout_seconds": 5})


# ---- the process -----------------------------------------------------------------------------------------------------


def ignore(number: int, frame: Any) -> None:
    pass


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "the working directory": (lambda: os.chdir("/"), os.getcwd),
    "torch's gradient mode": (lambda: torch.set_grad_enabled(False), torch.is_grad_enabled),
    "torch's default dtype": (lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype),
    "torch's default device": (lambda: torch.set_default_device("meta"), torch.get_default_device),
    "torch's number of threads": (lambda: torch.set_num_threads(3), torch.get_num_threads),
    "torch's precision of products": (
        lambda: torch.set_float32_matmul_precision("medium"),
        torch.get_float32_matmul_precision,
    ),
    "the alarm": (lambda: signal.setitimer(signal.ITIMER_REAL, 60), lambda: signal.getitimer(signal.ITIMER_REAL)),
    "the standard streams": (lambda: setattr(sys, "stdout", io.StringIO()), lambda: sys.stdout),
    "the handlers of signals": (
        lambda: [signal.signal(number, ignore) for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGXCPU)],
        lambda: [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGXCPU)],
    ),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("fails", [False, True])
def test_the_process_stays_as_it_was(what: str, fails: bool, capsys: pytest.CaptureFixture[str]) -> None:
    change, read = CHANGES[what]

    def changes(completions: Any) -> list[float]:
        change()
        if fails:
            raise ValueError("after the change")
        return [0.0 for _ in completions]

    before, built = read(), FunctionScorer(changes, f"changes_{fails}_{what[-5:]}")
    for _ in range(2):
        if fails:
            with pytest.raises(RewardError):
                built(TWO, None)
        else:
            built(TWO, None)
        assert read() == before
    assert capsys.readouterr().err.count(f"changed {what}") == 1


def test_an_async_function_in_a_deadline_keeps_the_gradient_mode(tmp_path: Path) -> None:
    async def asks(completions: Any) -> list[float]:
        await asyncio.sleep(0)
        return [float(torch.is_grad_enabled()) for _ in completions]

    built = scorer(asks)
    with torch.no_grad():
        assert built(TWO, None) == [0.0, 0.0]


@pytest.mark.parametrize("timeout_seconds", [None, 30.0])
def test_what_an_async_function_keeps_works_in_the_next_call(tmp_path: Path, timeout_seconds: float | None) -> None:
    """Such as a client whose connections belong to the event loop of the first call."""
    loops = []

    async def asks(completions: Any) -> list[float]:
        loops.append(asyncio.get_running_loop())
        return [float(loops[0].is_closed()) for _ in completions]

    built = scorer(asks).within(RewardFolder(tmp_path), timeout_seconds)
    assert [built(TWO, None) for _ in range(2)] == [[0.0, 0.0]] * 2
    assert loops[0] is loops[1]
