"""Generate messages of customers, and replies of mixed quality. The same seed gives the same texts."""

import random
import zlib
from dataclasses import dataclass
from functools import cache
from itertools import product, starmap

from keel.quickstart import grammar

SPLITS = ("sft", "ratings", "rl", "held_out")
END = "</s>"


@dataclass(frozen=True)
class Facts:
    """Topic, item and order number of a customer's message."""

    topic: str
    item: str
    number: str

    @property
    def split(self) -> str:
        """The only split that uses these facts, so that held-out prompts have new facts and not just new wordings."""
        # Not hash(), which Python randomises for strings in each process.
        return SPLITS[zlib.crc32(f"{self.topic} {self.item} {self.number}".encode()) % len(SPLITS)]


@dataclass(frozen=True)
class Habits:
    """How a group of agents writes: probabilities of independent choices."""

    right_action: float
    wrong_action: float  # with the remaining probability the agent shrugs
    right_number: float
    wrong_number: float  # with the remaining probability the reply has no number
    polite: float
    curt: float  # of the opening and of the closing; with the remaining probability there is none
    filler: float  # of each of two filler sentences


@dataclass(frozen=True)
class Draft:
    """Choices of an agent about a reply, before its words are drawn."""

    opening: str  # polite, curt or none
    number: str  # right, wrong or none
    action: str  # right, wrong or shrug
    fillers: int
    closing: str  # polite, curt or none


# The pre-training texts show all kinds of replies. The agents that SFT imitates are no better than that.
PRETRAINING = Habits(0.50, 0.30, 0.50, 0.35, 0.35, 0.30, 0.25)
MEDIOCRE = Habits(0.45, 0.30, 0.45, 0.20, 0.40, 0.30, 0.40)


def pretraining_corpus(seed: int, n: int) -> list[str]:
    """Return n texts: a message, a reply, the end token, and the customer's response to the reply.

    The customer's response teaches the model which replies fit which messages, before any reply is ranked.
    """
    rng = random.Random(f"pretraining {seed}")
    texts = []
    for facts in rng.choices(_split_facts("sft"), k=n):
        draft = draw_draft(rng, PRETRAINING)
        message, reply = write_message(rng, facts), write_reply(rng, facts, draft)
        texts.append(f"{message} {reply}{END} {compose_response(draft)}")
    return texts


def sft_data(seed: int, n: int) -> list[dict[str, str]]:
    """Return n rows of `prompt` and `completion`. The completions are by mediocre agents."""
    rng = random.Random(f"sft {seed}")
    return [
        {"prompt": write_message(rng, facts), "completion": write_reply(rng, facts, draw_draft(rng, MEDIOCRE))}
        for facts in rng.choices(_split_facts("sft"), k=n)
    ]


def prompts(seed: int, n: int, split: str) -> list[str]:
    """Return n different messages of one of SPLITS. No two splits share the facts of a message."""
    rng = random.Random(f"prompts {seed} {split}")
    messages: dict[str, None] = {}  # a dict keeps the order, a set does not
    while len(messages) < n:
        messages[write_message(rng, rng.choice(_split_facts(split)))] = None
    return list(messages)


def write_message(rng: random.Random, facts: Facts) -> str:
    """Write a customer's message. It ends in "agent:", so that the first word of the reply is a separate token."""
    sentences = [rng.choice(grammar.TOPICS[facts.topic].problems)]
    if rng.random() < 0.5:
        sentences.insert(0, rng.choice(grammar.GREETINGS))
    if rng.random() < 0.5:
        sentences.append(rng.choice(grammar.MOODS))
    sentences.append(rng.choice(grammar.REFERENCES))
    return _fill(" ".join([grammar.CUSTOMER, *sentences, grammar.AGENT]), facts)


def draw_draft(rng: random.Random, habits: Habits) -> Draft:
    """Draw the choices of a reply."""
    manners = {"polite": habits.polite, "curt": habits.curt}
    return Draft(
        opening=_choose(rng, manners, "none"),
        number=_choose(rng, {"right": habits.right_number, "wrong": habits.wrong_number}, "none"),
        action=_choose(rng, {"right": habits.right_action, "wrong": habits.wrong_action}, "shrug"),
        fillers=sum(rng.random() < habits.filler for _ in range(2)),
        closing=_choose(rng, manners, "none"),
    )


def write_reply(rng: random.Random, facts: Facts, draft: Draft) -> str:
    """Write a draft in words: opening, order number, action, fillers, closing."""
    other = Facts(
        rng.choice([topic for topic in grammar.TOPICS if topic != facts.topic]),
        facts.item,
        rng.choice([number for number in grammar.NUMBERS if number != facts.number]),
    )
    sentences = []
    if draft.opening != "none":
        sentences.append(rng.choice(grammar.OPENINGS[draft.opening]))
    if draft.number != "none":
        sentences.append(_fill(rng.choice(grammar.MENTIONS), facts if draft.number == "right" else other))
    if draft.action == "shrug":
        sentences.append(rng.choice(grammar.SHRUGS))
    else:
        actions = grammar.TOPICS[(facts if draft.action == "right" else other).topic].actions
        sentences.append(_fill(rng.choice(actions), facts))
    sentences += rng.sample(grammar.FILLERS, draft.fillers)
    if draft.closing != "none":
        sentences.append(rng.choice(grammar.CLOSINGS[draft.closing]))
    return " ".join(sentences)


def compose_response(draft: Draft) -> str:
    """Write the customer's response to a reply: a sentence each on action, number and manners."""
    curt, polite = ((draft.opening, draft.closing).count(manner) for manner in ("curt", "polite"))
    tone = "polite" if polite > curt else "curt" if curt > polite else "none"
    sentences = [
        grammar.RESPONSES_TO_ACTION[draft.action],
        grammar.RESPONSES_TO_NUMBER[draft.number],
        grammar.RESPONSES_TO_MANNERS[tone],
    ]
    return " ".join([*sentences, *([grammar.RESPONSE_TO_FILLERS] if draft.fillers else [])])


@cache
def _split_facts(split: str) -> tuple[Facts, ...]:
    combinations = starmap(Facts, product(grammar.TOPICS, grammar.ITEMS, grammar.NUMBERS))
    return tuple(facts for facts in combinations if facts.split == split)


def _choose(rng: random.Random, probabilities: dict[str, float], otherwise: str) -> str:
    remaining = 1 - sum(probabilities.values())
    [choice] = rng.choices([*probabilities, otherwise], [*probabilities.values(), remaining])
    return choice


def _fill(template: str, facts: Facts) -> str:
    return template.replace("{item}", facts.item).replace("{number}", facts.number)
