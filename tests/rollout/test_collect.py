"""Scores of parts of an answer: where they stand, and that they add up to the answer's score."""

from typing import Any

import pytest
import torch

from keel.errors import RewardError
from keel.rollout.collect import score, split
from keel.rollout.scorers import RewardModelScorer, Scorer, build_scorers

from .answers import END, answers, tokenizer_of, words

TOKENIZER, ANSWER = words("I came. I saw. I won.")  # seven tokens, the end token included


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Hello there. How are you?", ["Hello there. ", "How are you?"]),
        (" Yes!  No", [" Yes!  ", "No"]),
        ('She said "No!" He left...', ['She said "No!" ', "He left..."]),
        ("Pi is 3.14 (or so.) Is it?! Yes", ["Pi is 3.14 (or so.) ", "Is it?! ", "Yes"]),
        ("One.\nTwo.\n", ["One.\n", "Two.\n"]),
        ("no end\n", ["no end\n"]),
        (" ", [" "]),
        ("", [""]),
    ],
)
def test_sentences(text: str, parts: list[str]) -> None:
    assert split(text, "sentence") == parts


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a\n\nb\nc\n\nd", ["a\n\n", "b\nc\n\n", "d"]),
        ("a\n\n", ["a\n\n"]),
        ("\n\na", ["\n\n", "a"]),
        ("a", ["a"]),
        ("", [""]),
    ],
)
def test_delimiter(text: str, parts: list[str]) -> None:
    assert split(text, "\n\n") == parts


def placed(answer: Any, segments: str = "sentence", **settings: Any) -> list[float]:
    def f(**_: Any) -> Any:
        return [answer]

    scored = score(ANSWER, build_scorers([], [f]), TOKENIZER, segments, **settings)
    assert scored.segment_scores is not None
    torch.testing.assert_close(scored.segment_scores.sum(1), scored.scores, rtol=0, atol=0)
    return scored.segment_scores[0].tolist()


def test_each_score_stands_on_the_last_token_of_its_sentence() -> None:
    assert placed([1.0, 2.0, 4.0]) == [0, 1, 0, 2, 0, 0, 4]


def test_each_score_stands_on_the_last_token_of_its_step() -> None:
    assert placed([1.0, 2.0], segments="saw.") == [0, 0, 0, 1, 0, 0, 2]


def test_one_number_is_the_whole_answers() -> None:
    assert placed(3.0) == [0, 0, 0, 0, 0, 0, 3]


def test_a_functions_own_segments() -> None:
    """(text, reward) pairs need no setting."""
    assert placed([(" I", 1.0), (" came. I saw.", 2.0), (" I won.", 4.0)], segments="none") == [1, 0, 0, 2, 0, 0, 4]


def test_segments_that_share_a_token_add_up() -> None:
    assert placed([(" I c", 1.0), ("ame.", 2.0), (" I saw. I won.", 4.0)], segments="none") == [0, 3, 0, 0, 0, 0, 4]


def test_a_segment_ends_with_the_token_that_completes_it() -> None:
    """Tokens need not end where segments do: here one holds the end of the first and the start of the second.

    A function may ask for the segments.
    """
    tokenizer = tokenizer_of(["Say:", " He", "llo. H", "i", "!"], fused=True)
    rollouts = answers(tokenizer, [[3, 4, 5, 6], [3, END]])

    def lengths(segments: list[list[str]]) -> list[list[int]]:
        assert segments == [[" Hello. ", "Hi!"], [" He"]]
        return [[len(part) for part in parts] for parts in segments]

    scored = score(rollouts, build_scorers([], [lengths]), tokenizer, "sentence")
    assert scored.segment_scores is not None
    assert scored.segment_scores.tolist() == [[0, 8, 0, 3], [0, 3, 0, 0]]


def test_an_empty_answer_is_one_segment() -> None:
    rollouts = answers(TOKENIZER, [[END]])
    scored = score(rollouts, build_scorers([], [lambda completions: [[5.0]]]), TOKENIZER, "sentence")
    assert scored.segment_scores is not None
    assert scored.segment_scores.tolist() == [[5.0]]


def test_weights_and_none_among_scorers_of_segments() -> None:
    def parts(**_: Any) -> Any:
        return [[1.0, 2.0, 4.0]]

    def whole(**_: Any) -> Any:
        return [10.0]

    def silent(**_: Any) -> Any:
        return [None]

    scorers = build_scorers([], [parts, whole, silent])
    scorers[0].weight, scorers[1].weight = 2.0, -1.0
    scored = score(ANSWER, scorers, TOKENIZER, "sentence")
    assert scored.segment_scores is not None
    assert scored.segment_scores.tolist() == [[0, 2, 0, 4, 0, 0, -2]]
    assert scored.scores.tolist() == [4.0]
    assert scored.by_scorer["parts"].tolist() == [7.0]


@pytest.mark.parametrize(
    ("answer", "segments", "message"),
    [
        ([1.0, 2.0], "sentence", "f: sample 0 has 3 segments, got 2 rewards"),
        ([1.0], "none", "sample 0 got a list of rewards -> set reward.segments, or return"),
        ([(" I came.", 1.0), (" I won.", 1.0)], "none", "the segments of sample 0 do not join to its answer"),
        (
            [1.0, float("nan"), 2.0],
            "sentence",
            r"reward nan is no finite number: sample 0 \(' I came. I saw. I won.'\)",
        ),
        ([1.0, None, 2.0], "sentence", "reward None is no finite number: sample 0"),
    ],
)
def test_segments_that_do_not_fit(answer: Any, segments: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        placed(answer, segments)


class SquareOfWords:
    """A reward model that can be worked out by hand."""

    def score(self, contents: list[Any], texts: list[str]) -> torch.Tensor:
        return torch.tensor([float(len(text.split()) ** 2) for text in texts])


def reward_model_scorer() -> Scorer:
    scorer = RewardModelScorer.__new__(RewardModelScorer)
    scorer.judge, scorer.name, scorer.weight = SquareOfWords(), "squares", 1.0  # type: ignore[assignment]
    return scorer


def test_a_reward_model_scores_what_each_segment_adds() -> None:
    """4, 16 and 36 for the answer up to its first, second and third sentence."""
    scored = score(ANSWER, [reward_model_scorer()], TOKENIZER, "sentence")
    assert scored.segment_scores is not None
    assert scored.segment_scores.tolist() == [[0, 4, 0, 12, 0, 0, 20]]
    assert scored.scores.tolist() == [36.0]
    assert score(ANSWER, [reward_model_scorer()], TOKENIZER).scores.tolist() == [36.0]
