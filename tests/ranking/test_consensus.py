"""Rater weights and consensus scores: known raters are recovered, and nothing small or one-sided breaks them."""

import math
import time

import pytest

from keel.ranking.consensus import fit_consensus

from .judged import item, judged, simulated

SLOPES = {"anna": 2.0, "ben": 1.0, "cleo": 1.0, "dora": 0.5, "blind": 0.0}
SIZES = [(2, 800, 5), (4, 400, 5), (4, 600, 3), (9, 200, 3)]


@pytest.mark.parametrize(("answers", "items", "overlap"), SIZES)
def test_known_raters_are_recovered(answers: int, items: int, overlap: int):
    """In their order, and within 0.7 of the truth; the spread comes out smaller than it is."""
    _, rows = simulated(SLOPES, items, answers, overlap, seed=answers)
    weights = fit_consensus(rows).weights
    assert sum(weights.values()) / 5 == pytest.approx(1.0)
    assert weights["anna"] > max(weights["ben"], weights["cleo"])
    assert min(weights["ben"], weights["cleo"]) > weights["dora"] > weights["blind"]
    assert weights["blind"] < 0.2
    assert weights == pytest.approx({rater: slope / 0.9 for rater, slope in SLOPES.items()}, abs=0.7)


@pytest.mark.parametrize(("answers", "items", "overlap"), SIZES)
def test_a_contrary_rater_weighs_nothing(answers: int, items: int, overlap: int):
    _, rows = simulated(SLOPES | {"contrary": -1.0}, items, answers, overlap, seed=answers)
    weights = fit_consensus(rows).weights
    assert weights["contrary"] == 0.0
    assert weights["blind"] < 0.4 < weights["dora"]


def test_the_consensus_is_nearer_the_truth_than_a_plain_mean_of_ranks():
    """The reliable rater's order counts for more than that of two who guess."""
    items, rows = simulated({"anna": 3.0, "guess": 0.0, "other": 0.0, "ben": 3.0}, 300, 3, 4, seed=2)
    found = fit_consensus(rows)
    by_item = {one.number: [row for row in rows if row.item is one] for one in items}

    def order(scores: list[float]) -> list[int]:
        return sorted(range(3), key=lambda k: scores[k])

    def right(number: int, scores: list[float]) -> int:
        truth = next(row.ranks for row in by_item[number] if row.rater == "anna")
        return order(scores) == order([float(rank or 0) for rank in truth or ()])

    weighed = sum(right(one.number, [-(s or 0.0) for s in found.scores[one.number]]) for one in items)
    means = [[sum(row.ranks[k] or 0 for row in by_item[one.number] if row.ranks) for k in range(3)] for one in items]
    plain = sum(right(one.number, [float(m) for m in mean]) for one, mean in zip(items, means, strict=True))
    assert weighed > plain + 30


def test_raters_who_are_heard_alone_weigh_the_same():
    _, rows = simulated({"anna": 3.0, "ben": 0.0}, 400, 4, 1, seed=1)
    assert fit_consensus(rows).weights == pytest.approx({"anna": 1.0, "ben": 1.0}, abs=0.05)


def test_unanimous_raters_stay_finite_and_equal():
    items = [item(number) for number in range(1, 1001)]
    found = fit_consensus([judged(one, rater, (2, 1, 3)) for one in items for rater in ("anna", "ben", "cleo")])
    assert found.weights == pytest.approx({"anna": 1.0, "ben": 1.0, "cleo": 1.0})
    assert found.ranks(items[0]) == (2, 1, 3)
    assert all(score is not None and math.isfinite(score) and abs(score) < 20 for score in found.scores[1])


def test_one_ranking_is_its_own_consensus():
    one = item(1, *"abcd")
    found = fit_consensus([judged(one, "anna", (2, 1, 2, None))])
    assert found.weights == {"anna": 1.0}
    assert found.ranks(one) == (2, 1, 2, None)


def test_opposites_cancel_and_who_ties_everything_says_nothing():
    items = [item(number) for number in range(1, 51)]
    opposed = fit_consensus(
        [judged(one, rater, order) for one in items for rater, order in (("a", (1, 2, 3)), ("b", (3, 2, 1)))]
    )
    assert opposed.weights == pytest.approx({"a": 1.0, "b": 1.0})
    assert opposed.ranks(items[0]) == (1, 1, 1)
    tying = fit_consensus(
        [judged(one, rater, order) for one in items for rater, order in (("a", (1, 2, 3)), ("b", (1, 1, 1)))]
    )
    assert tying.weights["b"] < 0.2
    assert tying.ranks(items[0]) == (1, 2, 3)


def test_two_against_one_go_with_the_majority():
    one = item(1, "x", "y")
    found = fit_consensus([judged(one, "anna", (1, 2)), judged(one, "ben", (1, 2)), judged(one, "cleo", (2, 1))])
    assert found.ranks(one) == (1, 2)


def test_who_cannot_judge_and_what_nobody_ranked():
    one, two = item(1), item(2)
    found = fit_consensus([judged(one, "anna", (1, None, 2)), judged(two, "anna", None), judged(two, "ben", None)])
    assert found.weights == {"anna": 1.0}
    assert found.scores[1][1] is None
    assert found.scores[2] == (None, None, None)
    assert fit_consensus([judged(one, "anna", (1, None, None))]).weights == {}
    assert fit_consensus([]).scores == {}


def test_the_order_of_the_judgements_has_no_influence():
    _, rows = simulated(SLOPES, 50, 3, 3, seed=4)
    assert fit_consensus(rows) == fit_consensus(rows[::-1])


@pytest.mark.slow
def test_ten_thousand_rankings_take_seconds():
    _, rows = simulated({"anna": 2.0, "ben": 1.0, "cleo": 0.5}, 3334, 4, 3, seed=0)
    began = time.process_time()
    fit_consensus(rows)
    assert time.process_time() - began < 10  # 1 s alone on a core; this machine may be busy
