"""Two samples: the distance is the textbook one, and the test is right about chance, ties and gaps."""

import math

import numpy as np
import pytest

from keel.stats.two_samples import Rows, detectable_distance, difference_interval, distances, holm, superiority


def column(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64).reshape(-1, 1)


def test_the_distance_is_the_largest_difference_of_shares():
    found, _ = distances(column(1, 2, 3, 4), column(3, 4, 5, 6), seed=0, draws=9)
    assert found == pytest.approx([0.5])  # up to 2: half of the old, none of the new
    found, _ = distances(column(0, 0, 0, 1), column(0, 1, 1, 1), seed=0, draws=9)
    assert found == pytest.approx([0.5])  # shares of 1/4 and 3/4


def test_the_p_value_is_that_of_all_divisions():
    """Of the 20 ways to divide six numbers in two threes, two set the lower three apart: p = 1/10."""
    _, p = distances(column(1, 2, 3), column(4, 5, 6), seed=0, draws=20_000)
    assert p == pytest.approx([0.1], abs=0.01)


def test_equal_samples_are_never_told_apart():
    found, p = distances(column(*[7.0] * 10), column(*[7.0] * 5), seed=0, draws=99)
    assert (found, p) == (pytest.approx([0.0]), pytest.approx([1.0]))


def test_one_sample_cut_in_two_is_called_different_in_one_of_twenty():
    random = np.random.default_rng(5)
    _, p = distances(random.normal(size=(60, 400)), random.normal(size=(40, 400)), seed=1, draws=199)
    assert 0.02 < (p <= 0.05).mean() < 0.09


def test_a_shift_is_found_and_columns_without_figures_are_passed_over():
    random = np.random.default_rng(6)
    old, new = random.normal(size=(80, 2)), random.normal(size=(80, 2)) + 1.0
    old[::2, 1], new[:, 1] = math.nan, math.nan
    found, p = distances(old, new, seed=0, draws=999)
    assert found[0] > 0.3
    assert p[0] <= 0.001
    assert (found[1], p[1]) == (0.0, 1.0)


def test_a_distance_beyond_all_divisions_has_the_p_value_of_the_tail():
    apart, p = distances(column(*range(50)), column(*range(100, 200)), seed=0, draws=99)
    assert apart == pytest.approx([1.0])
    assert p == pytest.approx([math.e * math.exp(-2 * 50 * 100 / 150)])
    _, few = distances(column(1, 2, 3), column(4, 5, 6), seed=0, draws=9)
    assert few[0] >= 0.1  # three against three prove nothing, by whatever form


def test_superiority_by_hand():
    assert superiority(column(1, 2)[:, 0], column(2, 3)[:, 0]) == pytest.approx(3.5 / 4)
    assert superiority(column(1)[:, 0], column(1)[:, 0]) == 0.5
    assert math.isnan(superiority(column()[:, 0], column(1)[:, 0]))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_few_rows_can_tell_large_distances_only():
    # (1.3581 + 0.8416 / 2) sqrt(2 / 100), and at 5% / 20 (1.8282 + 0.8416 / 2) sqrt(2 / 100)
    assert detectable_distance(Rows(100, 100, None), 0.05) == pytest.approx(0.2516, abs=1e-4)
    assert detectable_distance(Rows(100, 100, None), 0.05 / 20) == pytest.approx(0.3181, abs=1e-4)
    assert detectable_distance(Rows(10, 10, None), 0.05) == pytest.approx(0.7955, abs=1e-4)
    assert detectable_distance(Rows(100, 0, None), 0.05) == math.inf


def test_what_shares_can_tell_by_hand():
    """0.3 against 0.502 of 100 each: 0.202 is 1.96 sqrt(0.401 0.599 / 50) + 0.8416 sqrt(0.0021 + 0.0025) + 0.01."""
    assert detectable_distance(Rows(100, 100, 0.3), 0.05) == pytest.approx(0.2030, abs=1e-3)
    assert detectable_distance(Rows(100, 100, 0.7), 0.05) == pytest.approx(0.2030, abs=1e-3)
    assert detectable_distance(Rows(3, 3, 0.5), 0.05) == math.inf
    assert Rows.from_samples(np.array([0.0, 1.0, 0.0, np.nan]), np.zeros(5)) == Rows(3, 5, 3 / 7)
    assert Rows.from_samples(np.array([0.0, 0.5]), np.zeros(5)).share is None


@pytest.mark.slow
@pytest.mark.parametrize("tests", [1, 12])
def test_what_is_called_detectable_is_found_in_four_of_five_samples(tests: int):
    """Distributions that differ in one place, and yes or no, by exactly so much; of 200 samples, within their luck."""
    random, level = np.random.default_rng(7), 0.05 / tests
    apart = detectable_distance(Rows(120, 90, None), level)
    new = random.random((90, 200)) + 2.0 * (random.random((90, 200)) < apart)
    _, p = distances(random.random((120, 200)), new, seed=1)
    assert (p <= level).mean() > 0.72
    share = detectable_distance(Rows(120, 90, 0.1), level)
    yes = [(random.random((n, 200)) < chance).astype(float) for n, chance in ((120, 0.1), (90, 0.1 + share))]
    _, p = distances(*yes, seed=1)
    assert 0.72 < (p <= level).mean() < 0.92


def test_the_interval_of_a_difference():
    old, new = (np.arange(400) % 2).astype(float), (np.arange(400) % 2) + 1.0
    low, high = difference_interval(old, new, seed=0)
    wide = 1.96 * 0.5 * math.sqrt(2 / 400)
    assert (low, high) == (pytest.approx(1 - wide, abs=0.01), pytest.approx(1 + wide, abs=0.01))
