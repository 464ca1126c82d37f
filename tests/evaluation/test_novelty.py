"""Novelty: the share of word pairs that the other prompts do not have."""

import pytest

from keel.evaluation.drift.novelty import PromptWordPairs

PROMPTS = ["my lamp is late.", "My lamp is broken.", "refund the kettle."]


def test_pairs_that_were_never_seen_are_counted():
    known = PromptWordPairs(PROMPTS)
    assert known.novelty("my lamp is late.") == 0.0
    assert known.novelty("my lamp is red.") == pytest.approx(2 / 4)  # "is red" and "red ."
    assert known.novelty("hola") == 1.0


def test_a_prompt_of_theirs_is_held_against_the_others():
    known = PromptWordPairs(PROMPTS)
    assert known.novelty(PROMPTS[0], is_one_of_them=True) == pytest.approx(2 / 4)  # "is late" and "late ."
    assert known.novelty(PROMPTS[2], is_one_of_them=True) == 1.0
    assert PromptWordPairs([*PROMPTS, PROMPTS[2]]).novelty(PROMPTS[2], is_one_of_them=True) == 0.0


def test_a_chat_is_its_text():
    chat = [{"role": "user", "content": "my lamp is late."}]
    assert PromptWordPairs([chat]).novelty(chat) == 0.0
    assert PromptWordPairs(PROMPTS).novelty(chat) == pytest.approx(2 / 6)  # "user :" and ": my"
