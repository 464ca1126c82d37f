"""From what scorers said to what the policy is paid."""

import math
from typing import Any

import pytest
import torch

from keel.learn.shaping import ScoreStatistics, Shaping, kept_scores

from .tables import ONE, rollouts, scored

THREE = [[1, 1, 1], [1], [1, 1]]  # lengths 3, 1, 2


def token_scores(
    scores: list[float],
    statistics: ScoreStatistics | None = None,
    truncated: list[bool] | None = None,
    segment_scores: list[list[float]] | None = None,
    **settings: Any,
) -> list[list[float]]:
    shaping = Shaping(**({"missing_eos_penalty": 0.0, "clip": None, "normalize": "none"} | settings))
    answers = rollouts(THREE[: len(scores)], truncated)
    placed = shaping.token_scores(scored(answers, scores, None, segment_scores), statistics or ScoreStatistics())
    return [[round(value, 6) for value in row] for row in placed.tolist()]


def test_plain_scores_stand_on_the_last_token() -> None:
    assert token_scores([0.5, 2.0, -1.0]) == [[0, 0, 0.5], [2, 0, 0], [0, -1, 0]]


def test_a_missing_end_costs() -> None:
    """Subtracted, not put in place of the score: [.7, .7] become [.7, -.3]."""
    assert token_scores([0.7, 0.7], truncated=[False, True], missing_eos_penalty=1.0) == [[0, 0, 0.7], [-0.3, 0, 0]]


def test_a_response_near_the_limit_costs() -> None:
    """Lengths 3, 1 and 2 of a limit of 3, with a soft range of 2 tokens: all, none and half of the penalty."""
    found = token_scores([0.5, 2.0, -1.0], max_response_tokens=3, overlong_tokens=2, overlong_penalty=4.0)
    assert found == [[0, 0, -3.5], [2, 0, 0], [0, -3, 0]]


def test_clip_comes_before_the_penalty() -> None:
    found = token_scores([5.0, -5.0, 5.0], truncated=[False, False, True], clip=1.0, missing_eos_penalty=2.0)
    assert found == [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]


@pytest.mark.parametrize("normalize", ["running", "reference"])
def test_normalised_scores(normalize: str) -> None:
    """Mean 2, standard deviation 2: 5 becomes 1.5. The limit is in units of the normalised score."""
    statistics = ScoreStatistics(count=4, mean=2.0, squares=16.0)
    assert token_scores([5.0, 2.0, -8.0], statistics, normalize=normalize, clip=3.0) == [
        [0, 0, 1.5],
        [0, 0, 0],
        [0, -3, 0],
    ]


def test_statistics_are_not_used_unless_asked_for() -> None:
    assert token_scores([5.0], ScoreStatistics(count=4, mean=2.0, squares=16.0)) == [[0, 0, 5]]


def test_segments_share_the_scale_and_the_last_token_takes_the_rest() -> None:
    """Mean 2, standard deviation 2; segments of 2 and 3 make 5, which becomes 1.5 = 1 + 0.5."""
    statistics = ScoreStatistics(count=4, mean=2.0, squares=16.0)
    assert token_scores([5.0], statistics, segment_scores=[[2.0, 0.0, 3.0]], normalize="running") == [[1, 0, 0.5]]
    assert token_scores([5.0], segment_scores=[[2.0, 0.0, 3.0]]) == [[2, 0, 3]]
    assert token_scores([5.0], segment_scores=[[2.0, 0.0, 3.0]], clip=4.0) == [[2, 0, 2]]
    found = token_scores([5.0], truncated=[True], segment_scores=[[2.0, 0.0, 3.0]], missing_eos_penalty=1.0)
    assert found == [[2, 0, 2]]


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_batches_merge_into_the_statistics_of_all(offset: float) -> None:
    statistics = ScoreStatistics()
    for part in ([1.0, 2.0], [3.0, 4.0, 5.0], [6.0], [math.nan], [math.inf, -math.inf]):
        statistics = statistics.plus(torch.tensor(part, dtype=torch.float64) + offset, ONE)
    assert statistics.count == 6
    assert statistics.mean == pytest.approx(offset + 3.5, abs=1e-9)
    assert statistics.squares == pytest.approx(17.5, abs=1e-6)
    assert statistics.std == pytest.approx(1.7078251, abs=1e-6)


def test_a_scale_that_cannot_be_known_yet_is_one() -> None:
    for scores in ([], [3.0], [3.0, 3.0]):
        statistics = ScoreStatistics()
        statistics = statistics.plus(torch.tensor(scores), ONE)
        assert statistics.std == 1.0


def test_dropped_answers_stay_out_of_the_statistics() -> None:
    answers = scored(rollouts(THREE), [1.0, 7.0, 3.0], kept=[True, False, True])
    statistics = ScoreStatistics()
    statistics = statistics.plus(kept_scores(answers), ONE)
    assert (statistics.count, statistics.mean) == (2, 2.0)
