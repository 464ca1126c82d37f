"""Intervals of means and shares against tables and worked examples."""

import math

import numpy as np
import pytest

from keel.stats.intervals import beta_quantile, incomplete_beta, mean_interval, share_interval, t_quantile


@pytest.mark.parametrize(("degrees", "expected"), [(1, 12.7062), (2, 4.302653), (9, 2.262157), (99, 1.984217)])
def test_quantiles_of_t_are_those_of_the_tables(degrees: int, expected: float):
    assert t_quantile(degrees) == pytest.approx(expected, abs=1e-4)


def test_quantiles_of_beta_give_the_limits_of_clopper_and_pearson():
    """8 of 10: 0.4439 to 0.9748."""
    assert beta_quantile(0.025, 8, 3) == pytest.approx(0.4439, abs=1e-4)
    assert beta_quantile(0.975, 9, 2) == pytest.approx(0.9748, abs=1e-4)
    assert incomplete_beta(0.3, 1.0, 1.0) == pytest.approx(0.3)  # uniform
    assert incomplete_beta(0.5, 4e5, 4e5) == pytest.approx(0.5)


def test_a_mean_of_symmetric_values_has_the_t_interval():
    """1 to 5: 3 -+ 2.776445 * 1.581139 / sqrt(5)."""
    low, high = mean_interval(np.arange(1.0, 6.0), np.ones(5))
    assert (low, high) == (pytest.approx(3 - 1.963243, abs=1e-5), pytest.approx(3 + 1.963243, abs=1e-5))


def test_a_mean_of_skewed_values_reaches_further_up_than_the_t_interval():
    values = np.array([0.0, 0.0, 0.0, 0.0, 5.0])  # t interval: 1 -+ 2.776445
    low, high = mean_interval(values, np.ones(5))
    assert low == pytest.approx(-1.776445, abs=1e-5)
    assert high > 7.0
    mirrored = mean_interval(-values, np.ones(5))
    assert mirrored == (pytest.approx(-high), pytest.approx(-low))


def test_means_of_constants_and_of_one_prompt():
    assert mean_interval(np.full(7, 0.1), np.ones(7)) == (pytest.approx(0.1), pytest.approx(0.1))
    assert mean_interval(np.full(1, 0.1), np.ones(1)) == (-math.inf, math.inf)


@pytest.mark.parametrize(("count", "low"), [(2, 0.158114), (20, 0.831567), (150, 0.975708)])
def test_a_share_of_which_all_prompts_agree(count: int, low: float):
    """All right: Clopper and Pearson, 0.025^(1/n). All half right: as far towards 0 and 1 as that many stay unseen."""
    assert share_interval(np.ones(count), np.ones(count)) == (pytest.approx(low, abs=1e-6), 1.0)
    half = share_interval(np.full(count, 0.5), np.ones(count))
    assert half == (pytest.approx(low / 2, abs=1e-6), pytest.approx(1 - low / 2, abs=1e-6))


def test_a_heavy_prompt_makes_fewer_of_them():
    """Weights 9 and 1 are worth 100 / 82 prompts."""
    low, _ = share_interval(np.array([9.0, 1.0]), np.array([9.0, 1.0]))
    assert low == pytest.approx(0.025**0.82, abs=1e-6)


def test_pairs_of_one_prompt_are_one_cluster():
    wins = np.array([1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    once, often = share_interval(wins, np.ones(10)), share_interval(6 * wins, np.full(10, 6.0))
    assert once == pytest.approx(often)
    assert once[0] < 0.444  # wider than the limits of Clopper and Pearson, which know the variance
    assert once[1] > 0.9748
