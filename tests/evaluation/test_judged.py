"""Figures of judged answers: intervals that mean what they say, length control, best of n, slices, the frontier."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from keel.data.prompts import Prompt
from keel.errors import ConfigError
from keel.evaluation import frontier
from keel.evaluation.best_of import best_of_curve, equivalent_best_of_n
from keel.evaluation.frontier import compute_frontier, fit_frontier, resamples
from keel.evaluation.judged import EvaluatedResponses, comparison, length_controlled_comparison, row_mean
from keel.evaluation.slices import slice_rows


def judged(score: Any, **more: Any) -> EvaluatedResponses:
    """Answers of which only the measures are known."""
    measured = {name: torch.as_tensor(values, dtype=torch.float64) for name, values in {"score": score, **more}.items()}
    zeros = torch.zeros_like(measured["score"])
    rows, copies = zeros.shape
    prompts = [Prompt(f"p{row}", f"p{row}", (1,), {}) for row in range(rows)]
    blank = {name: zeros for name in ("length", "truncated") if name not in measured}
    return EvaluatedResponses(prompts, [[""] * copies] * rows, measured | blank)


# ---- intervals -------------------------------------------------------------------------------------------------------


def test_every_figure_has_an_interval_of_the_normal_width():
    values = torch.randn(400, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    figures = judged(values + 3.0, kl=values * 2, length=torch.full((400, 1), 7.0)).compute_metrics()
    wide = 1.96 * float(values.std()) / 20
    assert figures["score_high"] - figures["score_low"] == pytest.approx(2 * wide, rel=0.05)
    assert figures["kl_high"] - figures["kl_low"] == pytest.approx(4 * wide, rel=0.05)
    assert (figures["length_low"], figures["length"], figures["length_high"]) == (7.0, 7.0, 7.0)


def test_answers_to_one_prompt_are_no_further_prompts():
    """Ten copies of an answer say nothing new: the interval is that of one."""
    values = torch.randn(50, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    once, often = judged(values).compute_metrics(), judged(values.expand(50, 10)).compute_metrics()
    assert often["score_low"] == pytest.approx(once["score_low"])
    assert often["score_high"] == pytest.approx(once["score_high"])


def test_means_over_tokens_are_weighted_by_length():
    figures = judged([[0.0], [0.0]], entropy=[[2.0], [24.0]], length=[[2.0], [8.0]]).compute_metrics()
    assert figures["entropy"] == 2.6
    # residuals -+3.2, variance 2 * 2 * 3.2^2 / 10^2; weights 2 and 8 leave one degree of freedom: t = 12.7062
    assert figures["entropy_high"] - figures["entropy_low"] == pytest.approx(2 * 12.7062 * 0.64, rel=1e-4)


def test_the_same_prompt_twice_is_one_prompt():
    """Duplicated rows repeat the mean, and make no interval narrower."""
    values = torch.randn(30, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    once = judged(values, length=values.exp())
    twice = EvaluatedResponses(
        once.prompts * 2, once.texts * 2, {name: torch.cat([own, own]) for name, own in once.measured.items()}
    )
    found, expected = twice.compute_metrics(), once.compute_metrics()
    assert found == {name: pytest.approx(value) for name, value in expected.items()}
    other = judged(values.flip(0), length=values.flip(0).exp())
    again = EvaluatedResponses(
        other.prompts * 2, other.texts * 2, {name: torch.cat([own, own]) for name, own in other.measured.items()}
    )
    compared = comparison(twice.measured["score"], again.measured["score"], twice.clusters)
    alone = comparison(once.measured["score"], other.measured["score"], once.clusters)
    assert compared == {name: pytest.approx(value) for name, value in alone.items()}


def test_a_scorer_that_had_nothing_to_say_is_no_zero():
    figures = judged([[0.0]] * 4, **{"rewards/code": [[math.nan], [2.0], [math.nan], [4.0]]}).compute_metrics()
    assert figures["rewards/code"] == 3.0
    assert figures["rewards/code_high"] == pytest.approx(3 + 12.7062, abs=1e-3)  # of two prompts, not of four


def test_a_scorer_of_zeros_and_ones_is_a_share():
    figures = judged([[0.5]] * 20, **{"rewards/rule": [[0.0]] * 20}).compute_metrics()
    assert figures["rewards/rule_high"] == pytest.approx(0.168433, abs=1e-6)  # Clopper and Pearson, 0 of 20
    assert (figures["score_low"], figures["score_high"]) == (0.5, 0.5)


@pytest.mark.parametrize(("count", "unseen"), [(150, 0.024292), (20, 0.168433), (3, 0.707598)])
def test_a_share_of_none_or_all_is_no_certainty(count: int, unseen: float):
    """Clopper and Pearson's limits for 0 of n, 95%: 1 - 0.025^(1/n)."""
    found = row_mean("win_rate", torch.ones(count), torch.arange(count))
    assert (found["win_rate_low"], found["win_rate_high"]) == (pytest.approx(1 - unseen, abs=1e-6), 1.0)
    assert judged(torch.zeros(count, 2)).compute_metrics()["truncated_high"] == pytest.approx(unseen, abs=1e-6)


@pytest.mark.exhaustive
def test_intervals_hold_the_truth_in_nineteen_of_twenty_files():
    """A policy that wins 70% of prompts, four pairs each, of which the win rate differs by prompt."""
    random = torch.Generator().manual_seed(2)
    held = 0
    for _ in range(200):
        chance = 0.7 + 0.25 * (2 * torch.rand(80, 1, generator=random) - 1)
        wins = (torch.rand(80, 4, generator=random) < chance).double()
        found = row_mean("win_rate", wins.mean(1), torch.arange(80))
        held += found["win_rate_low"] <= 0.7 <= found["win_rate_high"]
    assert 180 <= held <= 199


def test_resamples_draw_as_many_prompts_as_there_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(frontier, "AT_ONCE", 5)
    parts = list(resamples(5, 0, 7))
    assert [part.shape for part in parts] == [(1, 5)] * 7
    assert all(float(part.sum()) == 5 for part in parts)
    assert torch.equal(torch.cat(parts).sum(1), torch.full((7,), 5.0, dtype=torch.float64))


# ---- comparisons -----------------------------------------------------------------------------------------------------


def test_prompts_without_a_score_are_left_out_of_a_comparison():
    nan = math.nan
    ours, theirs = torch.tensor([[1.0, nan], [nan, nan], [0.0, 0.0]]), torch.tensor([[0.0], [5.0], [1.0]])
    figures = comparison(ours, theirs)
    assert (figures["win_rate"], figures["score_difference"]) == (0.5, 0.0)
    assert comparison(torch.full((2, 1), nan), torch.zeros(2, 1)) == {}


def test_a_judge_of_lengths_is_seen_through():
    """Ours wins where it is longer and is longer mostly: the raw rate is high, the length-controlled one is not."""
    random = torch.Generator().manual_seed(3)
    gaps = 3.0 + 3.0 * torch.randn(300, 1, generator=random, dtype=torch.float64)
    wins = torch.rand(300, 1, generator=random, dtype=torch.float64) < torch.sigmoid(2 * torch.tanh(gaps / 3))
    ours = judged(wins.double(), length=20.0 + gaps)
    theirs = judged(torch.full((300, 1), 0.5), length=torch.full((300, 1), 20.0))
    raw = comparison(ours.measured["score"], theirs.measured["score"])
    found = length_controlled_comparison(ours, theirs, "score")
    assert raw["win_rate_low"] > 0.6
    assert found["length_controlled_win_rate_low"] < 0.5 < found["length_controlled_win_rate_high"]


def test_where_one_side_wins_all_length_explains_nothing():
    ours = judged([[1.0]] * 30, length=[[9.0]] * 15 + [[3.0]] * 15)
    theirs = judged([[0.0]] * 30, length=[[6.0]] * 30)
    found = length_controlled_comparison(ours, theirs, "score")
    assert found["length_controlled_win_rate"] == 1.0
    assert found["length_controlled_win_rate_low"] == pytest.approx(0.025 ** (1 / 30))
    empty = judged([[math.nan]] * 3)
    assert length_controlled_comparison(empty, judged([[0.0]] * 3), "score") == {}


@pytest.mark.parametrize(("shorter", "overlap"), [(0, 0.0), (1, 0.025), (4, 0.1)])
def test_a_side_that_is_always_longer_has_no_length_controlled_rate(shorter: int, overlap: float):
    random = torch.Generator().manual_seed(8)
    lengths = torch.tensor([[2.0]] * shorter + [[8.0]] * (40 - shorter)) + torch.rand(40, 1, generator=random)
    ours = judged((torch.rand(40, 1, generator=random) < 0.6).double(), length=lengths)
    theirs = judged([[0.5]] * 40, length=[[5.0]] * 40)
    found = length_controlled_comparison(ours, theirs, "score")
    assert found["length_overlap"] == pytest.approx(overlap)
    assert math.isnan(found["length_controlled_win_rate"]) == (overlap < 0.05)
    assert math.isnan(found["length_controlled_win_rate_low"]) == (overlap < 0.05)


def test_the_other_side_has_the_rest_of_the_length_controlled_rate():
    random = torch.Generator().manual_seed(4)
    one, other = (
        judged(torch.randn(40, 2, generator=random), length=torch.randint(5, 30, (40, 2), generator=random))
        for _ in range(2)
    )
    here, there = (
        length_controlled_comparison(a, b, "score")["length_controlled_win_rate"]
        for a, b in ((one, other), (other, one))
    )
    assert here + there == pytest.approx(1.0)


# ---- best of n -------------------------------------------------------------------------------------------------------


def test_the_best_of_n_by_hand():
    found = best_of_curve(judged([[3.0, 1.0, 2.0]], **{"rewards/gold": [[0.0, 9.0, 6.0]]}), 3)
    assert [point["n"] for point in found] == [1, 2, 3]
    assert [point["score"] for point in found] == pytest.approx([2.0, 8 / 3, 3.0])
    assert [point["rewards/gold"] for point in found] == pytest.approx([5.0, 2.0, 0.0])
    assert [point["kl_bound"] for point in found] == pytest.approx([0.0, 0.193147, 0.431946], abs=1e-6)


def test_the_best_of_n_of_many_normal_scores_is_that_of_the_tables():
    """Expected largest of 2, 3 and 4 normal numbers: 0.5642, 0.8463, 1.0294."""
    scores = torch.randn(4000, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = best_of_curve(judged(scores), 4)
    for point, expected in zip(found, (0.0, 0.5642, 0.8463, 1.0294), strict=True):
        assert point["score"] == pytest.approx(expected, abs=0.02)
        assert point["score_low"] <= expected <= point["score_high"]


def test_a_chosen_answer_without_a_word_of_a_scorer_is_left_out():
    nan = math.nan
    found = best_of_curve(judged([[1.0, 2.0], [1.0, 2.0]], **{"rewards/x": [[4.0, nan], [4.0, 8.0]]}), 2)
    assert found[1]["rewards/x"] == 8.0


def test_a_prompt_of_which_an_answer_has_no_score_is_left_out():
    scores = [[3.0, 1.0, 2.0], [9.0, math.nan, 9.0], [6.0, 4.0, 5.0]]
    found = best_of_curve(judged(scores), 3)
    assert [point["score"] for point in found] == pytest.approx([3.5, 25 / 6, 4.5])
    assert [point["prompts"] for point in found] == [2, 2, 2]
    assert all(point["score_low"] <= point["score"] <= point["score_high"] for point in found)
    assert best_of_curve(judged([[1.0, math.nan]]), 2) == []
    assert equivalent_best_of_n(1.0, []) is None


def test_what_an_answer_is_worth_in_draws():
    curve = [{"n": 1, "score": 0.0}, {"n": 2, "score": 1.0}, {"n": 3, "score": 1.5}]
    assert [equivalent_best_of_n(score, curve) for score in (-1.0, 1.0, 1.2, 2.0)] == [1, 2, 3, None]


# ---- slices ----------------------------------------------------------------------------------------------------------


def prompts(*columns: dict[str, Any]) -> list[Prompt]:
    return [Prompt("p", "p", (1,), own) for own in columns]


def test_slices_are_the_values_of_a_column_most_first():
    rows = prompts({"t": "a", "n": 1}, {"t": "b", "n": None}, {"t": "b"}, {"t": True})
    assert slice_rows(rows, ["t"]) == {"t=b": [1, 2], "t=a": [0], "t=true": [3]}
    assert slice_rows(rows, ["n"]) == {"n=null": [1, 2, 3], "n=1": [0]}
    assert slice_rows(rows, []) == {}


def test_a_column_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="no prompt has a column 'topc'; did you mean topic"):
        slice_rows(prompts({"topic": "a"}), ["topc"])
    with pytest.raises(ConfigError, match="the prompts have no other columns"):
        slice_rows(prompts({}), ["topic"])
    with pytest.raises(ConfigError, match="column 'id' has 101 values"):
        slice_rows(prompts(*({"id": i} for i in range(101))), ["id"])


def test_a_slice_has_the_figures_of_its_rows():
    whole = judged([[1.0], [2.0], [4.0]], length=[[1.0], [5.0], [9.0]])
    some = whole.rows([0, 2])
    assert some.summary() == {"score": 2.5, "length": 5.0, "truncated": 0.0}
    assert [prompt.content for prompt in some.prompts] == ["p0", "p2"]


# ---- the frontier ----------------------------------------------------------------------------------------------------


def run_of(scores: list[float], kls: list[float], noise: float = 0.0) -> list[EvaluatedResponses]:
    """Checkpoints of a run, 200 prompts, with these means."""
    random = torch.Generator().manual_seed(6)

    def values(mean: float) -> Tensor:
        own = torch.randn(200, 1, generator=random, dtype=torch.float64)
        return mean + noise * (own - own.mean())

    return [judged(values(score), kl=values(kl)) for score, kl in zip(scores, kls, strict=True)]


# R(d) = d (2 - ln d), as in tests/stats/test_overoptimisation.py: highest at KL e^2 = 7.389.
KL = [0.0, 1.0, 4.0, 9.0, 25.0, 64.0]
SCORE = [0.0, 2.0, 2.6137056388801094, 2.7041631339956706, 1.9528104378294993, -0.6355323334386871]


def test_a_run_past_its_peak_is_told_so():
    found = fit_frontier(run_of(SCORE, KL, noise=0.2), "score", seed=0)
    assert found is not None
    assert found["peak_kl"] == pytest.approx(7.389, abs=0.05)
    assert found["peak_kl_low"] < 7.389 < found["peak_kl_high"]
    assert found["behind"] == 1.0
    assert found["says"].startswith("past its peak: the peak is at KL 7.")


def test_a_run_before_its_peak_is_told_so():
    found = fit_frontier(run_of([*SCORE[:3], 2.66], [*KL[:3], 5.0], noise=0.02), "score", seed=0)
    assert found is not None
    assert found["behind"] == 0.0
    assert found["says"].startswith("before its peak")


def test_a_rising_run_has_no_peak():
    found = fit_frontier(run_of([0.0, 1.0, 2.5, 4.5], [0.0, 1.0, 4.0, 9.0]), "score", seed=0)
    assert found is not None
    assert found["says"] == "no peak: the score rises as the KL does"


FALLS = "past its peak, which is the start: the score falls as the KL rises"
DOWN_AND_UP = "no peak: the score fell at first and rises again, and at KL 16 is still below the start"
SHAPES = [  # d = 0, 1, 2, 3, 4
    ("-d", [0.0, -1.0, -2.0, -3.0, -4.0], FALLS),
    ("d (-2 + 0.5 ln d)", [0.0, -2.0, -3.306852819, -4.352081567, -5.227411278], FALLS),
    ("d (-2 + ln d)", [0.0, -2.0, -2.613705639, -2.704163134, -2.454822556], DOWN_AND_UP),
    ("d (-0.5 + ln d)", [0.0, -0.5, 0.386294361, 1.795836866, 3.545177444], "no peak: the score rises as the KL does"),
    ("d", [0.0, 1.0, 2.0, 3.0, 4.0], "no peak: the score rises as the KL does"),
]


@pytest.mark.parametrize(("form", "scores", "says"), SHAPES)
def test_a_run_without_a_peak_ahead_is_told_what_the_score_does(form: str, scores: list[float], says: str):
    found = fit_frontier(run_of(scores, [0.0, 1.0, 4.0, 9.0, 16.0], noise=0.001), "score", seed=0)
    assert found is not None
    assert found["says"] == says
    assert found["behind"] == float(says == FALLS)
    assert (found["peak_kl_high"] < 0.01) == (says == FALLS)


def test_noise_is_no_verdict():
    found = fit_frontier(run_of([0.0, 0.1, 0.05, 0.1, 0.08], [0.0, 1.0, 4.0, 9.0, 16.0], noise=2.0), "score", seed=0)
    assert found is not None
    assert found["says"].startswith("too close to say")


def test_three_checkpoints_are_too_few_and_every_figure_is_there():
    sides = dict(zip(("start", "step 1", "step 2"), run_of(SCORE[:3], KL[:3]), strict=True))
    figures = {name: own.compute_metrics() for name, own in sides.items()}
    found = compute_frontier({"start": 0, "step 1": 1, "step 2": 2}, sides, figures, seed=0)
    assert [point["step"] for point in found["points"]] == [0, 1, 2]
    assert [point["score"] for point in found["points"]] == pytest.approx(SCORE[:3])
    assert found["points"][2]["kl_low"] <= 4.0 <= found["points"][2]["kl_high"]
    assert found["fits"] == {"score": None}
    json.dumps(found)
