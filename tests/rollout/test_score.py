"""Scores of parts of an answer: where they stand, and that they add up to the answer's score."""

# ruff: noqa: RUF001  sentences of other scripts end in other marks

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteFallback, ByteLevel, Fuse, Sequence
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel as ByteLevelSplit
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from keel.data.prompts import Prompt
from keel.errors import RewardError
from keel.models.reading import Reading
from keel.rollout.score import score, token_ends
from keel.rollout.scorers import RewardModelScorer, Scorer, build_scorers
from keel.rollout.segments import split_segments

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
        ("Wait… what?! No…", ["Wait… ", "what?! ", "No…"]),
        ("»Ja.« Er ging. „Nein.“ Ende", ["»Ja.« ", "Er ging. ", "„Nein.“ ", "Ende"]),
        ("你好。我很好！“真的吗？”他说：v1.5……可以。", ["你好。", "我很好！", "“真的吗？”", "他说：v1.5……可以。"]),
        (
            "「行こう。」彼は言った。『え？！』３．１４です．次｡",
            ["「行こう。」", "彼は言った。", "『え？！』", "３．１４です．", "次｡"],
        ),
        ("（好。）【好！】《好？》好。“好”", ["（好。）", "【好！】", "《好？》", "好。", "“好”"]),
        ("यह ठीक है। वह आया॥ हाँ", ["यह ठीक है। ", "वह आया॥ ", "हाँ"]),
        ("هل أنت بخير؟ نعم۔ جيد.", ["هل أنت بخير؟ ", "نعم۔ ", "جيد."]),
        ("Բարև։ Լավ եմ։", ["Բարև։ ", "Լավ եմ։"]),
        ("ሰላም። ደህና ነህ፧ አዎ", ["ሰላም። ", "ደህና ነህ፧ ", "አዎ"]),
        ("Πώς είσαι\u037e Καλά; ναι.", ["Πώς είσαι\u037e ", "Καλά; ναι."]),
        ("សួស្តី។ បាទ", ["សួស្តី។ ", "បាទ"]),
        ("สวัสดี สบายดีไหม", ["สวัสดี สบายดีไหม"]),
        (" ", [" "]),
        ("", [""]),
    ],
)
def test_sentences(text: str, parts: list[str]) -> None:
    assert split_segments(text, "sentence") == parts


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
    assert split_segments(text, "\n\n") == parts


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


BYTES = [f"<0x{number:02X}>" for number in range(256)]


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Every character is as many tokens as it has bytes in UTF-8, as in the byte fallback of SentencePiece models."""
    vocabulary = {piece: i for i, piece in enumerate(["<pad>", "</s>", "<unk>", *BYTES])}
    made = Tokenizer(BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    made.decoder = Sequence([ByteFallback(), Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def scored_parts(tokenizer: Any, tokens: list[int]) -> list[float]:
    """Scores 1, 2, 4, ... of the sentences of a response, on its tokens."""

    def f(segments: list[list[str]]) -> list[list[float]]:
        return [[2.0**k for k in range(len(parts))] for parts in segments]

    scored = score(answers(tokenizer, [tokens]), build_scorers([], [f]), tokenizer, "sentence")
    assert scored.segment_scores is not None
    return scored.segment_scores[0].tolist()


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("好。我", [5, 9]),  # three bytes a character, and the end token
        ("a。🎉！", [3, 11]),
        ("🎉! a", [4, 7]),
        ("é. 好。好", [2, 9, 13]),
    ],
)
def test_a_character_of_several_tokens_is_complete_with_its_last(text: str, places: list[int]) -> None:
    """Before that it decodes to replacement characters, as many as it has bytes so far."""
    tokens = [3 + byte for byte in text.encode()] + [END]
    scores = scored_parts(bytes_tokenizer(), tokens)
    assert {place: value for place, value in enumerate(scores) if value} == {p: 2.0**k for k, p in enumerate(places)}


def test_a_byte_level_vocabulary_that_splits_characters() -> None:
    """As GPT-2 and Llama 3 do with rare ones: one replacement character stands for the bytes so far."""
    names = bytes_to_unicode()
    vocabulary = {piece: i for i, piece in enumerate(["<pad>", "</s>", *(names[byte] for byte in range(256))])}
    made = Tokenizer(BPE(vocabulary, []))
    made.pre_tokenizer, made.decoder = ByteLevelSplit(add_prefix_space=False), ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<pad>")
    scores = scored_parts(tokenizer, [*tokenizer.encode("好。🎉"), END])
    assert {place: value for place, value in enumerate(scores) if value} == {5: 1.0, 10: 2.0}


def test_a_real_model_with_byte_fallback(shared_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "models" / "stories260K")
    tokens = tokenizer.encode("你好。我很好！", add_special_tokens=False)
    assert len(tokens) == 22  # 7 characters of 3 bytes, and the space before a text
    text = tokenizer.decode(tokens)
    rollouts = replace(
        answers(tokenizer, [tokens]), truncated=torch.tensor([True]), texts=[text], prompts=[Prompt("", "", (), {})]
    )
    assert token_ends(rollouts, 0, ["你好。", "我很好！"], tokenizer) == [9, 21]


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
        ([(" I came.", 1.0), (" I won.", 1.0)], "none", "the segments of sample 0 do not join to its response"),
        (
            [1.0, float("nan"), 2.0],
            "sentence",
            r"reward nan is not a finite number: sample 0 \(' I came. I saw. I won.'\)",
        ),
        ([1.0, None, 2.0], "sentence", "reward None is not a finite number: sample 0"),
    ],
)
def test_segments_that_do_not_fit(answer: Any, segments: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        placed(answer, segments)


class SquareOfWords:
    """A reward model that can be worked out by hand."""

    cut: list[bool]

    def score_readings(self, readings: list[Reading]) -> torch.Tensor:
        self.cut = [False] * len(readings)
        return torch.tensor([float(len(reading.response.split()) ** 2) for reading in readings])


def reward_model_scorer() -> Scorer:
    scorer = RewardModelScorer.__new__(RewardModelScorer)
    scorer.reward_model, scorer.name, scorer.weight = SquareOfWords(), "squares", 1.0  # type: ignore[assignment]
    return scorer


def test_a_reward_model_scores_what_each_segment_adds() -> None:
    """4, 16 and 36 for the answer up to its first, second and third sentence."""
    scored = score(ANSWER, [reward_model_scorer()], TOKENIZER, "sentence")
    assert scored.segment_scores is not None
    assert scored.segment_scores.tolist() == [[0, 4, 0, 12, 0, 0, 20]]
    assert scored.scores.tolist() == [36.0]
    assert score(ANSWER, [reward_model_scorer()], TOKENIZER).scores.tolist() == [36.0]
