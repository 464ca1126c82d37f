"""The hidden judge agrees with what a person would say of replies written by hand."""

import itertools
import random

import pytest

from keel.quickstart import grammar
from keel.quickstart.corpus import Draft, Facts, write_reply
from keel.quickstart.gold import WORDS_NEEDED, Gold, gold_parts, gold_score

RIGHT, WRONG = grammar.NUMBERS[3], grammar.NUMBERS[5]
PROMPT = f"customer: hello. my lamp is broken. i am upset. it is order {RIGHT}. agent:"
FLAWLESS = f"i am happy to help. i found order {RIGHT}. i will replace the broken lamp. have a nice day."


def test_a_flawless_reply_has_every_point() -> None:
    assert gold_parts(PROMPT, FLAWLESS) == Gold(help=4, number=2, manners=2, brevity=0, fluency=2)
    assert gold_score(PROMPT, FLAWLESS) == 10


@pytest.mark.parametrize(
    ("better", "worse"),
    list(
        itertools.pairwise(
            [
                FLAWLESS,
                f"i found order {RIGHT}. i will replace the broken lamp. have a nice day.",
                "i will replace the broken lamp. have a nice day.",
                "i will replace the broken lamp.",
                "i will replace the broken lamp. bye.",
                f"this is order {WRONG}. i will replace the broken lamp. bye.",
                f"this is order {WRONG}. please wait. bye.",
                f"this is order {WRONG}. i will refund the lamp. bye.",
                "lamp lamp the order nice. nice nice day day. happy.",
            ]
        )
    ),
)
def test_order_of_hand_written_replies(better: str, worse: str) -> None:
    assert gold_score(PROMPT, better) > gold_score(PROMPT, worse)


@pytest.mark.parametrize(
    "trick",
    [
        "",
        "have a nice day. " * 8,
        "thank you for writing. " * 8 + "have a nice day.",
        "i am happy to help. good to hear you. dear customer. all the best. have a nice day.",
        " ".join(f"this is order {number}." for number in grammar.NUMBERS),
        " ".join(action for topic in grammar.TOPICS.values() for action in topic.actions).replace("{item}", "lamp"),
        "yes. dear customer. have a nice day.",
        "that helps. right order. kind.",
        PROMPT,
        "polite nice kind help order broken lamp new day.",
    ],
)
def test_tricks_earn_less_than_a_plain_right_answer(trick: str) -> None:
    plain = gold_score(PROMPT, "we will repair the broken lamp.")
    assert plain == 6
    assert -13 <= gold_score(PROMPT, trick.strip()) <= 2


@pytest.mark.parametrize(
    ("change", "part", "loss"),
    [
        (("broken lamp", "broken coat"), "help", 2),  # the right action for another item
        (("i will replace the broken lamp", "please cancel the lamp"), "help", 5),  # no agent says that
        (("i will replace the broken lamp", "i will cancel the lamp"), "help", 6),
        ((RIGHT, WRONG), "number", 4),
        (("i am happy to help", "what now?"), "manners", 2),
        (("have a nice day.", "bye."), "manners", 2),
        (("have a", "many people work here. have a"), "brevity", 0.95),  # and two words more than anyone needs
        (("have a nice day.", "have a nice"), "fluency", 1.5),  # cut off by a length limit: one sentence in four
        (("have a nice day.", f"i found order {RIGHT}. have a nice day."), "fluency", 1.2),  # said twice: one in five
    ],
)
def test_each_flaw_costs_its_part(change: tuple[str, str], part: str, loss: float) -> None:
    assert change[0] in FLAWLESS
    flawed = gold_parts(PROMPT, FLAWLESS.replace(*change))
    assert getattr(flawed, part) == pytest.approx(getattr(gold_parts(PROMPT, FLAWLESS), part) - loss)


def test_sentences_out_of_order_are_not_fluent() -> None:
    first, *others = grammar.sentences(FLAWLESS)
    assert gold_parts(PROMPT, " ".join([*others, first])).fluency == 0.5
    assert gold_parts(PROMPT, " ".join([*others, first])).manners == 0


def test_what_the_writers_intended_is_what_the_judge_sees(rng: random.Random) -> None:
    for topic, opening, number, action, fillers, closing in itertools.product(
        grammar.TOPICS,
        ("polite", "curt", "none"),
        ("right", "wrong", "none"),
        ("right", "wrong", "shrug"),
        (0, 1, 2),
        ("polite", "curt", "none"),
    ):
        facts, draft = Facts(topic, "tent", RIGHT), Draft(opening, number, action, fillers, closing)  # type: ignore[arg-type]
        problem = grammar.TOPICS[topic].problems[0].replace("{item}", "tent")
        reply = write_reply(rng, facts, draft)
        parts = gold_parts(f"customer: {problem} order {RIGHT}. agent:", reply)
        tone = {"polite": 1, "curt": -1, "none": 0}
        assert parts.help == {"right": 4, "wrong": -2, "shrug": -1}[action]
        assert parts.number == {"right": 2, "wrong": -2, "none": 0}[number]
        assert parts.manners == tone[opening] + tone[closing]
        assert parts.fluency == 2
        assert parts.brevity == pytest.approx(-0.75 * fillers - 0.1 * max(0, len(reply.split()) - WORDS_NEEDED))


def test_no_needed_word_is_too_many() -> None:
    parts = [
        grammar.OPENINGS["polite"],
        grammar.MENTIONS,
        [action for topic in grammar.TOPICS.values() for action in topic.actions],
        grammar.CLOSINGS["polite"],
    ]
    assert sum(max(len(sentence.split()) for sentence in pool) for pool in parts) == WORDS_NEEDED
