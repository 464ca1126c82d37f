"""Python functions as scorers: every answer they can give, and every way they can fail."""

import asyncio
import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from keel.config import RewardSource
from keel.config.sections import with_scorer_names
from keel.errors import ConfigError, RewardError
from keel.rollout.score import score
from keel.rollout.scorers import build_scorers

from .answers import answers, tokenizer_of, words

TOKENIZER, EIGHT = words(*(" ".join(["yes"] * n) for n in range(1, 9)))
COUNTS = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]


def count_words(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text.split())) for text in completions]


def scores_of(*functions: Callable[..., Any], on_failure: str = "stop") -> list[float]:
    return score(EIGHT, build_scorers([], functions), TOKENIZER, on_failure=on_failure).scores.tolist()


def returns(answer: Any) -> Callable[..., Any]:
    def fixed(**_: Any) -> Any:
        return answer

    return fixed


def test_a_function() -> None:
    assert scores_of(count_words) == COUNTS


def test_an_async_function() -> None:
    async def later(completions: list[str]) -> list[float]:
        await asyncio.sleep(0)
        return count_words(completions)

    assert scores_of(later) == COUNTS


def test_an_async_function_where_a_loop_is_running() -> None:
    """As in a notebook."""

    async def later(completions: list[str]) -> list[float]:
        await asyncio.sleep(0)
        return count_words(completions)

    async def notebook() -> list[float]:
        return scores_of(later)

    assert asyncio.run(notebook()) == COUNTS


@pytest.mark.parametrize(
    "answer",
    [
        (1, 2, 3, 4, 5, 6, 7, 8),
        np.arange(1, 9),
        np.arange(1, 9, dtype=np.float32),
        torch.arange(1, 9),
        torch.arange(1.0, 9.0, requires_grad=True),
        [np.float32(n) for n in range(1, 9)],
        [torch.tensor(float(n)) for n in range(1, 9)],
    ],
    ids=["tuple of int", "numpy int", "numpy float", "tensor int", "tensor with grad", "numpy scalars", "tensors"],
)
def test_what_counts_as_a_list_of_rewards(answer: Any) -> None:
    assert scores_of(returns(answer)) == COUNTS


def test_trls_signature_with_columns() -> None:
    """Everything comes by keyword: texts, token ids, and the prompts' other columns."""
    seen: dict[str, Any] = {}

    def correct(prompts: Any, completions: Any, completion_ids: Any, answer: Any, **kwargs: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, kwargs=kwargs)
        return [float(text.strip() == right) for text, right in zip(completions, answer, strict=True)]

    tokenizer = tokenizer_of(["Sum:", "four", "five"])
    columns = [{"answer": "four", "level": 1}, {"answer": "four"}]
    rollouts = answers(tokenizer, [[3, 1], [4, 3]], columns)
    assert score(rollouts, build_scorers([], [correct]), tokenizer).scores.tolist() == [1.0, 0.0]
    others = seen.pop("kwargs")
    assert others.keys() == {"level", "trainer_state", "log_extra", "log_metric"}
    assert others["level"] == [1, None]
    assert seen == {
        "prompts": ["Say:", "Say:"],
        "completions": [" four", " five four"],
        "completion_ids": [[3, 1], [4, 3]],  # the end token is one of them
    }


def test_only_the_keywords_that_a_function_takes() -> None:
    def two(completion_ids: list[list[int]], level: list[int]) -> list[float]:
        return [len(ids) + 10.0 * n for ids, n in zip(completion_ids, level, strict=True)]

    tokenizer = tokenizer_of(["a", "b"])
    rollouts = answers(tokenizer, [[2, 3, 1], [2, 1]], [{"level": 3, "other": "x"}, {"level": 4, "other": "y"}])
    assert score(rollouts, build_scorers([], [two]), tokenizer).scores.tolist() == [33.0, 42.0]


def test_chat_prompts_come_and_go_as_messages() -> None:
    chat = [{"role": "user", "content": "Hello"}]

    def polite(prompts: Any, completions: Any) -> list[float]:
        assert prompts == [chat]
        assert completions == [[{"role": "assistant", "content": " please"}]]
        return [1.0]

    tokenizer = tokenizer_of(["Hello", "please"])
    rollouts = answers(tokenizer, [[3, 1]], content=chat)
    assert score(rollouts, build_scorers([], [polite]), tokenizer).scores.tolist() == [1.0]


def test_none_adds_nothing() -> None:
    def odd(**_: Any) -> list[float | None]:
        return [10.0, None] * 4

    scored = score(EIGHT, build_scorers([], [odd, count_words]), TOKENIZER)
    assert scored.scores.tolist() == [11.0, 2.0, 13.0, 4.0, 15.0, 6.0, 17.0, 8.0]
    assert scored.kept.all()
    assert scored.by_scorer["odd"].isnan().tolist() == [False, True] * 4


def test_none_from_everyone_is_an_error() -> None:
    with pytest.raises(RewardError, match=r"no scorer had a score for sample 3 \(' yes yes yes yes'\)"):
        scores_of(returns([1.0, 1.0, 1.0, None, 1.0, 1.0, 1.0, None]))


@pytest.mark.parametrize("half", [Decimal("0.5"), Fraction(1, 2), np.float16(0.5), torch.tensor(0.5)], ids=type)
def test_a_number_of_any_type_is_a_score(half: Any) -> None:
    assert scores_of(returns([half] * 8)) == [0.5] * 8


def test_a_yes_counts_one() -> None:
    assert scores_of(returns([True, False, np.True_, np.False_, True, False, True, False])) == [1.0, 0.0] * 4


@pytest.mark.parametrize("on_failure", ["stop", "drop"])
def test_one_reward_too_few(on_failure: str) -> None:
    scorers = build_scorers([], [returns([0.0] * 7)])
    if on_failure == "stop":
        with pytest.raises(RewardError, match="reward function fixed: expected 8 rewards, got 7"):
            score(EIGHT, scorers, TOKENIZER)
    else:  # nobody can say which one is missing
        assert not score(EIGHT, scorers, TOKENIZER, on_failure="drop").kept.any()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (math.nan, "reward nan is not a finite number"),
        (-math.inf, "reward -inf is not a finite number"),
        ("0.5", "reward '0.5' is not a finite number"),
        (np.float64("nan"), "reward nan is not a finite number"),
        ({"reward": 1.0}, r"reward \{'reward': 1.0\} is not a finite number"),
    ],
)
def test_a_reward_that_is_no_score_names_the_sample(bad: Any, reason: str) -> None:
    answer: list[Any] = [0.0] * 8
    answer[2] = bad
    with pytest.raises(RewardError, match=rf"fixed: {reason}: sample 2 \(' yes yes yes'\)"):
        scores_of(returns(answer))


def test_a_bad_reward_may_cost_its_answer_alone() -> None:
    answer = [1.0, 2.0, math.nan, 4.0, 5.0, 6.0, 7.0, 8.0]
    scored = score(EIGHT, build_scorers([], [returns(answer), count_words]), TOKENIZER, on_failure="drop")
    assert scored.kept.tolist() == [True, True, False, True, True, True, True, True]
    assert scored.scores[scored.kept].tolist() == [2.0, 4.0, 8.0, 10.0, 12.0, 14.0, 16.0]
    assert scored.by_scorer["fixed"].isnan().tolist() == [False, False, True, False, False, False, False, False]


@pytest.mark.parametrize("answer", [None, 1.0, "12345678", {"rewards": [1.0] * 8}])
def test_no_list(answer: Any) -> None:
    with pytest.raises(RewardError, match=r"expected a list of rewards, got"):
        scores_of(returns(answer))


def test_an_exception_keeps_its_words() -> None:
    def careless(completions: list[str]) -> list[float]:
        return [1 / 0 for _ in completions]

    with pytest.raises(RewardError, match=r"careless \(test_scorers\.py:\d+\): ZeroDivisionError: division by zero"):
        scores_of(careless)
    assert not score(EIGHT, build_scorers([], [careless]), TOKENIZER, on_failure="drop").kept.any()


def test_weights_and_names(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def f(completions, **_):\n    return [float(len(text.split())) for text in completions]\n")
    sources = with_scorer_names([RewardSource(function=f"{file}:f", weight=weight) for weight in (0.5, -2.0)])
    scored = score(EIGHT, build_scorers(sources, [count_words]), TOKENIZER)
    assert scored.scores.tolist() == [-0.5 * n for n in COUNTS]
    assert {name: values.tolist() for name, values in scored.by_scorer.items()} == {
        "f": COUNTS,
        "f_2": COUNTS,
        "count_words": COUNTS,
    }


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("", "{file}:f", "no function 'f'"),
        ("f = 3", "{file}:f", "no function 'f'"),
        ("import nothing_of_that_name", "{file}:f", "ModuleNotFoundError on import"),
        ("", "elsewhere.py:f", "no such file -> give FILE.py:NAME"),
        ("", "no_colon", "no such file -> give FILE.py:NAME"),
    ],
)
def test_functions_that_cannot_be_loaded(tmp_path: Path, text: str, place: str, message: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        build_scorers([RewardSource(function=place.format(file=file))])


def test_no_scorer_at_all() -> None:
    with pytest.raises(ConfigError, match="rewards: no scorer -> name a reward model, a function or a url"):
        build_scorers([])
