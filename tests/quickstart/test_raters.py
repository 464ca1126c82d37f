"""Simulated raters give rankings as people would: better first mostly, ties, gaps, and no gold."""

import math
import random

import pytest

from keel.quickstart.gold import gold_score
from keel.quickstart.grammar import NUMBERS
from keel.quickstart.raters import simulated_ranks, simulated_ratings

PROMPT = f"customer: my lamp is late. order {NUMBERS[0]}. agent:"
BEST = f"dear customer. this is order {NUMBERS[0]}. i will trace the late lamp. have a nice day."
GOOD = "i will trace the late lamp."
POOR = "please wait."
AWFUL = f"what now? this is order {NUMBERS[1]}. i will cancel the lamp. bye."


def test_without_noise_ranks_follow_the_gold_score(rng: random.Random) -> None:
    for _ in range(100):
        ranks = simulated_ranks(PROMPT, [POOR, BEST, AWFUL, GOOD], rng, noise=0.0)
        kept = [rank for rank in ranks if rank is not None]
        assert len(kept) >= 2
        assert sorted(kept) == list(range(1, len(kept) + 1))
        if None not in ranks:
            assert ranks == [3, 1, 4, 2]


def test_equal_replies_and_replies_of_equal_worth_tie(rng: random.Random) -> None:
    twin = "the late lamp comes tomorrow."
    assert gold_score(PROMPT, twin) == gold_score(PROMPT, GOOD)
    seen = [simulated_ranks(PROMPT, [GOOD, GOOD, POOR], rng, noise=2.0) for _ in range(200)]
    assert all(ranks[0] == ranks[1] for ranks in seen if None not in ranks)
    without_noise = [simulated_ranks(PROMPT, [GOOD, twin, POOR], rng, noise=0.0) for _ in range(200)]
    assert {tuple(ranks) for ranks in without_noise if None not in ranks} == {(1, 1, 2)}


def test_some_answers_are_left_unranked_but_never_all(rng: random.Random) -> None:
    seen = [simulated_ranks(PROMPT, [BEST, GOOD, POOR, AWFUL], rng, noise=1.0) for _ in range(1000)]
    missing = sum(ranks.count(None) for ranks in seen) / 4000
    assert 0.03 < missing < 0.07
    assert all(4 - ranks.count(None) >= 2 for ranks in seen)
    assert all(min(rank for rank in ranks if rank) == 1 for ranks in seen)


def test_noise_is_that_of_the_bradley_terry_model(rng: random.Random) -> None:
    """Strictly better by more than the tie width: P = sigmoid((d - 0.5) / noise)."""
    noise, other = 2.0, "i will trace the late lamp. have a nice day."
    difference = gold_score(PROMPT, other) - gold_score(PROMPT, GOOD)
    seen = [simulated_ranks(PROMPT, [other, GOOD], rng, noise) for _ in range(2000)]
    assert difference == 1
    assert seen.count([1, 2]) / 2000 == pytest.approx(1 / (1 + math.exp(-(difference - 0.5) / noise)), abs=0.04)
    assert seen.count([2, 1]) / 2000 == pytest.approx(1 / (1 + math.exp((difference + 0.5) / noise)), abs=0.04)


def test_ratings_are_rankings_rows_one_for_each_rater() -> None:
    replies = [[BEST, POOR, GOOD], [AWFUL, GOOD, GOOD]]
    rows = simulated_ratings([PROMPT, PROMPT], replies, seed=0, raters=3)
    assert [row["responses"] for row in rows] == [replies[0]] * 3 + [replies[1]] * 3
    for row in rows:
        assert set(row) == {"prompt", "responses", "ranks"}
        assert row["prompt"] == PROMPT
        assert all(rank is None or rank in (1, 2, 3) for rank in row["ranks"])  # type: ignore[attr-defined]
    assert rows == simulated_ratings([PROMPT, PROMPT], replies, seed=0, raters=3)
    many = [PROMPT] * 50, [[GOOD, POOR]] * 50
    assert simulated_ratings(*many, seed=0, noise=5.0) != simulated_ratings(*many, seed=1, noise=5.0)
