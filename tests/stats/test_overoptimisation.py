"""Gao et al.'s form is found again in points made from it, and says where the score turns."""

import math

import pytest

from keel.stats.overoptimisation import OveroptimisationFit, fit_overoptimisation

# alpha 2, beta 1, start 0: R(d) = d (2 - ln d), highest at d = e, where it is e. KL = d^2.
KL = [0.0, 0.25, 1.0, 4.0, 9.0, 25.0]
SCORE = [0.0, 1.3465735902799727, 2.0, 2.6137056388801094, 2.7041631339956706, 1.9528104378294993]


def test_alpha_and_beta_are_found_again():
    found = fit_overoptimisation(KL, SCORE)
    assert found is not None
    assert (found.alpha, found.beta) == pytest.approx((2.0, 1.0), abs=1e-12)
    assert found.start == pytest.approx(0.0, abs=1e-12)
    assert found.residual == pytest.approx(0.0, abs=1e-12)


def test_the_score_turns_at_e_to_the_alpha_over_beta_minus_one():
    found = fit_overoptimisation(KL, SCORE)
    assert found is not None
    assert found.peak_kl == pytest.approx(7.38905609893065)  # e^2
    assert found.peak_score == pytest.approx(2.718281828459045)
    assert found.is_behind(9.0)
    assert not found.is_behind(7.0)
    assert [found.predict(kl) for kl in KL] == pytest.approx(SCORE, abs=1e-12)


def test_a_score_that_does_not_start_at_zero_gives_the_same_form():
    found = fit_overoptimisation(KL, [score - 3.5 for score in SCORE])
    assert found is not None
    assert (found.start, found.alpha, found.beta) == pytest.approx((-3.5, 2.0, 1.0), abs=1e-12)
    assert found.peak_score == pytest.approx(2.718281828459045 - 3.5)


@pytest.mark.parametrize("beta", [0.0, -0.5])
def test_a_score_that_bends_upward_has_no_peak(beta: float):
    rising = [math.sqrt(kl) * (1.0 - beta * math.log(math.sqrt(kl) or 1.0)) for kl in KL]
    found = fit_overoptimisation(KL, rising)
    assert found is not None
    assert found.beta == pytest.approx(beta, abs=1e-12)
    if beta < 0:  # rounding decides the sign of a zero
        assert (found.peak_kl, found.peak_score) == (None, None)
    assert not found.is_behind(25.0)


# R(d) = d (alpha - beta ln d): its slope alpha - beta (1 + ln d) by hand, at d = 1, e and e^2.
SLOPES = [
    ("straight down", -1.0, 0.0, [-1.0, -1.0, -1.0]),
    ("down, and ever less so", -2.0, -0.5, [-1.5, -1.0, -0.5]),
    ("down, and up from d = e on", -2.0, -1.0, [-1.0, 0.0, 1.0]),
    ("up, and ever more so", 1.0, -0.5, [1.5, 2.0, 2.5]),
    ("up, and down from d = e on", 2.0, 1.0, [1.0, 0.0, -1.0]),
    ("up to d = 1 / e only", 0.0, 1.0, [-1.0, -2.0, -3.0]),
]


@pytest.mark.parametrize(("what", "alpha", "beta", "slopes"), SLOPES)
def test_the_peak_is_behind_where_the_score_falls(what: str, alpha: float, beta: float, slopes: list[float]):
    form = OveroptimisationFit.from_coefficients(0.0, alpha, beta, 0.0)
    kls = [1.0, 7.38905609893065, 54.598150033144236]
    assert [form.slope(kl) for kl in kls] == pytest.approx(slopes, abs=1e-12)
    sure = [(kl, slope) for kl, slope in zip(kls, slopes, strict=True) if slope]
    assert [form.is_behind(kl) for kl, _ in sure] == [slope < 0 for _, slope in sure]
    assert not form.is_behind(0.0)
    assert not form.is_behind(-0.1)


def test_a_straight_line_has_its_peak_beyond_all_measure_or_none():
    found = fit_overoptimisation([1.0, 4.0, 9.0, 16.0], [1.0, 2.0, 3.0, 4.0])
    assert found is not None
    assert found.peak_kl is None or found.peak_kl > 1e6


def test_fewer_than_four_different_points_are_not_fitted():
    assert fit_overoptimisation(KL[:3], SCORE[:3]) is None
    assert fit_overoptimisation([1.0] * 6, SCORE) is None
    assert fit_overoptimisation([], []) is None


def test_points_that_are_no_numbers_are_left_out_and_a_negative_kl_is_none():
    found = fit_overoptimisation([*KL, 30.0, math.nan], [*SCORE, math.nan, 1.0])
    assert found is not None
    assert (found.alpha, found.beta) == pytest.approx((2.0, 1.0), abs=1e-12)
    below = fit_overoptimisation([-0.01, *KL[1:]], SCORE)
    assert below is not None
    assert below.alpha == pytest.approx(2.0, abs=1e-12)


def test_the_residual_is_in_units_of_the_score():
    # one point off by 0.1 of six: the rest takes up what it can, and some is left
    found = fit_overoptimisation(KL, [*SCORE[:3], SCORE[3] + 0.1, *SCORE[4:]])
    assert found is not None
    assert 0.0 < found.residual < 0.1 / math.sqrt(6)
