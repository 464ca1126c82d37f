"""Agreement between raters, against published figures and hand counts."""

import random
import time
from typing import Any

import numpy as np
import pytest

from keel.ranking.agreement import summary
from keel.stats.alpha import alpha, coincidences, ordinal_scale

from .judged import item, judged, simulated

# Krippendorff 2011, "Computing Krippendorff's alpha-reliability", section C: four coders, twelve units.
CODERS = """
    1 2 3 3 2 1 4 1 2 . . .
    1 2 3 3 2 2 4 1 2 5 . 3
    . 3 3 3 2 3 4 2 2 5 1 .
    1 2 3 3 2 4 4 1 2 5 1 .
"""
UNITS = np.array([[float("nan" if mark == "." else mark) for mark in row.split()] for row in CODERS.split("\n")[1:5]]).T


def test_alpha_of_the_published_example():
    parts, levels = coincidences(UNITS, np.arange(12), 12)
    whole = parts.sum(0)
    assert levels.tolist() == [1, 2, 3, 4, 5]
    assert whole.sum(1).tolist() == pytest.approx([9, 13, 10, 5, 3])  # the marginals printed there; 40 in all
    assert float(alpha(whole, ordinal_scale(whole))) == pytest.approx(0.815, abs=5e-4)
    assert float(alpha(whole, levels)) == pytest.approx(0.849, abs=5e-4)


def test_alpha_of_no_difference_is_not_defined():
    whole = coincidences(np.array([[1.0, 1.0], [1.0, np.nan]]), np.zeros(2, dtype=int), 1)[0][0]
    assert np.isnan(alpha(whole, ordinal_scale(whole)))


def test_alpha_of_two_complete_orders_is_their_rank_correlation():
    # Spearman by hand: 1 - 6 * (sum of squared differences 6) / (4 * 15) = 0.4; alpha = 1 - 0.6 * 7 / 8 (8 values)
    one = item(1, "a", "b", "c", "d")
    figures = summary([judged(one, "anna", (1, 2, 3, 4)), judged(one, "ben", (2, 1, 4, 3))], [one], ["anna", "ben"], 2)
    # squared differences 4, rho = 1 - 24 / 60 = 0.6
    assert figures["alpha"]["value"] == pytest.approx(1 - 0.4 * 7 / 8)
    assert figures["alpha"]["low"] is None  # one item has no spread


def test_the_place_of_an_answer_does_not_hang_on_how_ties_and_gaps_are_numbered():
    items = [item(n, "a", "b", "c") for n in range(1, 30)]
    orders = [((1, 1, 2), (1, 1, 3)), ((2, 5, 9), (1, 2, 3)), ((1, None, 2), (1, None, 3))]
    rows = [judged(one, rater, orders[one.number % 3][k]) for one in items for k, rater in enumerate(["anna", "ben"])]
    assert summary(rows, items, ["anna", "ben"], 2)["alpha"] == pytest.approx({"value": 1.0, "low": 1.0, "high": 1.0})


def test_blind_raters_agree_as_chance_has_it_and_contrary_ones_less():
    items, rows = simulated({"anna": 0.0, "ben": 0.0}, 400, 4, 2, seed=5)
    blind = summary(rows, items, ["anna", "ben"], 2)
    assert blind["alpha"]["low"] < 0 < blind["alpha"]["high"]
    assert blind["agreement"]["low"] < 0.5 < blind["agreement"]["high"]
    items, rows = simulated({"anna": 2.0, "ben": -2.0}, 400, 4, 2, seed=5)
    assert summary(rows, items, ["anna", "ben"], 2)["alpha"]["high"] < -0.2


def test_the_interval_covers_what_further_items_show():
    truth = summary(*reversed(simulated({"anna": 1.0, "ben": 1.0}, 4000, 3, 2, seed=1)), ["anna", "ben"], 2)  # type: ignore[misc]
    covered = {"alpha": 0, "agreement": 0}
    for seed in range(2, 42):
        items, rows = simulated({"anna": 1.0, "ben": 1.0}, 60, 3, 2, seed)
        figures = summary(rows, items, ["anna", "ben"], 2)
        for name in covered:
            covered[name] += figures[name]["low"] <= truth[name]["value"] <= figures[name]["high"]
    assert min(covered.values()) >= 34  # of 40; 38 are expected


FIRST, SECOND, THIRD = item(1, "a", "bb", "ccc"), item(2, "aa", "bb"), item(3, "a", "bb")
JUDGED = [
    judged(FIRST, "anna", (1, 2, 3), shown=(0, 1, 2), seconds=4.0),
    judged(FIRST, "ben", (2, 1, 3), shown=(2, 1, 0), seconds=8.0),
    judged(FIRST, "cleo", (1, 1, None), shown=(0, 1, 2), seconds=30.0),
    judged(SECOND, "anna", (1, 2), shown=(1, 0), seconds=2.0),
    judged(SECOND, "ben", (2, 1), shown=(1, 0), seconds=6.0),
    judged(THIRD, "ben", None, shown=(0, 1), seconds=1.0),
]


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return summary(JUDGED, [FIRST, SECOND, THIRD], ["anna", "ben", "cleo", "dora"], 2)


def test_counts_and_times(figures: dict[str, Any]):
    names = ("items", "overlap", "judgements", "complete", "cannot_judge", "seconds")
    assert [figures[name] for name in names] == [3, 2, 6, 2, 1, {"median": 5.0, "total": 51.0}]


def test_agreement_is_over_pairs_that_both_told_apart(figures: dict[str, Any]):
    # item 1, anna and ben: ab against, ac and bc with each other; cleo tied ab and left c out; item 2: against
    assert figures["agreement"]["value"] == pytest.approx(2 / 4)
    assert figures["agreement"]["pairs"] == 4
    assert figures["agreement"]["low"] == pytest.approx(0.0)
    assert figures["agreement"]["high"] == pytest.approx(2 / 3)


def test_what_was_shown_earlier_and_what_is_longer(figures: dict[str, Any]):
    # anna: 3 of 3 and 0 of 1 for the earlier; ben (c, b, a): a over c no, b over a yes, b over c no; b over a: yes
    assert figures["position"]["value"] == pytest.approx((3 + 0 + 1 + 1) / 8)
    # unequal lengths in item 1 only: anna 0 of 3; ben: b over a
    assert figures["longer"]["value"] == pytest.approx(1 / 6)
    assert (figures["position"]["pairs"], figures["longer"]["pairs"]) == (8, 6)


def test_each_rater_against_the_rest(figures: dict[str, Any]):
    anna, ben, cleo, dora = figures["raters"]
    assert (anna["name"], anna["done"], anna["cannot_judge"], anna["median_seconds"]) == ("anna", 2, 0, 3.0)
    assert (ben["done"], ben["cannot_judge"], ben["ties"], ben["longer"]) == (3, 1, 0.0, pytest.approx(1 / 3))
    assert anna["agreement"]["value"] == ben["agreement"]["value"] == pytest.approx(0.5)
    assert (cleo["ties"], cleo["agreement"]["value"], cleo["position"]) == (1.0, None, None)
    assert (dora["done"], dora["median_seconds"], dora["ties"], dora["weight"]) == (0, None, None, None)
    assert sum(rater["weight"] for rater in (anna, ben, cleo)) == pytest.approx(3.0)


def test_items_of_disagreement_come_worst_first(figures: dict[str, Any]):
    worst, second = figures["disagreements"]
    assert (worst["item"], worst["agreement"], worst["responses"]) == (2, 0.0, ["aa", "bb"])
    assert worst["rankings"] == [{"rater": "anna", "ranks": [1, 2]}, {"rater": "ben", "ranks": [2, 1]}]
    assert (second["item"], second["agreement"]) == (1, pytest.approx(2 / 3))


def test_a_chat_is_told_as_lines():
    chat = item(1, "a", "b", prompt=[{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}])  # type: ignore[arg-type]
    rows = [judged(chat, "anna", (1, 2)), judged(chat, "ben", (2, 1))]
    [told] = summary(rows, [chat], ["anna", "ben"], 2)["disagreements"]
    assert told["prompt"] == "system: Be kind.\nuser: Hi"


def test_nothing_at_all_is_told_as_none():
    empty = summary([], [], [], 1)
    assert empty["alpha"] == {"value": None, "low": None, "high": None}
    assert empty["agreement"] == {"value": None, "low": None, "high": None, "pairs": 0}
    assert (empty["seconds"], empty["raters"], empty["disagreements"]) == ({"median": None, "total": 0.0}, [], [])
    waiting = summary([], [FIRST], ["anna"], 1)
    assert (waiting["items"], waiting["complete"], waiting["raters"][0]["done"]) == (1, 0, 0)


def test_the_same_rankings_give_the_same_figures():
    items, rows = simulated({"anna": 1.0, "ben": 0.5}, 30, 3, 2, seed=3)
    assert summary(rows, items, ["anna", "ben"], 2) == summary(rows[::-1], items, ["anna", "ben"], 2)


@pytest.mark.slow
def test_a_thousand_items_take_a_second_or_so():
    items, rows = simulated({"anna": 2.0, "ben": 1.0, "cleo": 0.5}, 1000, 4, 3, seed=0)
    began = time.process_time()
    summary(rows, items, ["anna", "ben", "cleo"], 3)
    assert time.process_time() - began < 4  # 0.5 s alone on a core; this machine may be busy


def test_of_very_many_items_groups_are_drawn_and_the_intervals_stay(monkeypatch: pytest.MonkeyPatch):
    draw = random.Random(0)
    items = [item(number) for number in range(1, 1501)]
    orders = [[1, 2, 3], [2, 1, 3], [3, 2, 1]]
    said = [judged(each, rater, draw.choice(orders)) for each in items for rater in ("anna", "ben")]
    alone = summary(said, items, ["anna", "ben"], 2)
    monkeypatch.setattr("keel.stats.bootstrap.MOST_UNITS", 500)
    grouped = summary(said, items, ["anna", "ben"], 2)
    for name in ("alpha", "agreement", "position"):
        assert grouped[name]["value"] == pytest.approx(alone[name]["value"])
        width = alone[name]["high"] - alone[name]["low"]
        assert grouped[name]["high"] - grouped[name]["low"] == pytest.approx(width, rel=0.2)
