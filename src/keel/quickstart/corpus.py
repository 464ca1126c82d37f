"""Texts of the support world: customers' messages, and replies of mixed quality. Same seed, same texts."""

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
    """What one customer's message is about."""

    topic: str
    item: str
    number: str

    @property
    def split(self) -> str:
        """The only split that may write about these facts: held-out facts are new, not just new wordings."""
        return SPLITS[zlib.crc32(f"{self.topic} {self.item} {self.number}".encode()) % len(SPLITS)]


@dataclass(frozen=True)
class Habits:
    """How a crowd of agents writes: chances of each choice, independent of each other."""

    right_action: float
    wrong_action: float  # otherwise the agent shrugs
    right_number: float
    wrong_number: float  # otherwise none is named
    polite: float
    curt: float  # otherwise neither; for opening and closing alike
    filler: float  # chance of each of two filler sentences


@dataclass(frozen=True)
class Draft:
    """What an agent decided to write, before the words."""

    opening: str  # polite, curt or none
    number: str  # right, wrong or none
    action: str  # right, wrong or shrug
    fillers: int
    closing: str  # polite, curt or none


# All that people write shows what is possible; the agents whose replies are imitated are no better than that.
PRETRAINING = Habits(0.50, 0.30, 0.50, 0.35, 0.35, 0.30, 0.25)
MEDIOCRE = Habits(0.45, 0.30, 0.45, 0.20, 0.40, 0.30, 0.40)


def pretraining_corpus(seed: int, n: int) -> list[str]:
    """n texts: a message, a reply, the end token, and what the customer says to that.

    These last words are why a model trained on this can tell what fits what, before anyone ranks a reply.
    """
    rng = random.Random(f"pretraining {seed}")
    texts = []
    for facts in rng.choices(_facts_of("sft"), k=n):
        draft = draw_draft(rng, PRETRAINING)
        message, reply = write_message(rng, facts), write_reply(rng, facts, draft)
        texts.append(f"{message} {reply}{END} {compose_response(draft)}")
    return texts


def sft_data(seed: int, n: int) -> list[dict[str, str]]:
    """n rows of `prompt` and `completion`; the completions are a mediocre crowd's."""
    rng = random.Random(f"sft {seed}")
    return [
        {"prompt": write_message(rng, facts), "completion": write_reply(rng, facts, draw_draft(rng, MEDIOCRE))}
        for facts in rng.choices(_facts_of("sft"), k=n)
    ]


def prompts(seed: int, n: int, split: str) -> list[str]:
    """n different messages of one of SPLITS; no two splits share the facts of a message."""
    rng = random.Random(f"prompts {seed} {split}")
    found: dict[str, None] = {}  # a dict keeps the order, a set does not
    while len(found) < n:
        found[write_message(rng, rng.choice(_facts_of(split)))] = None
    return list(found)


def write_message(rng: random.Random, facts: Facts) -> str:
    """A customer's message; it ends in "agent:", so that the reply's first word is a token of its own."""
    parts = [rng.choice(grammar.TOPICS[facts.topic].problems)]
    if rng.random() < 0.5:
        parts.insert(0, rng.choice(grammar.GREETINGS))
    if rng.random() < 0.5:
        parts.append(rng.choice(grammar.MOODS))
    parts.append(rng.choice(grammar.REFERENCES))
    return _fill(" ".join([grammar.CUSTOMER, *parts, grammar.AGENT]), facts)


def draw_draft(rng: random.Random, habits: Habits) -> Draft:
    """A draft of chance quality."""
    manners = {"polite": habits.polite, "curt": habits.curt}
    return Draft(
        opening=_choose(rng, manners, "none"),
        number=_choose(rng, {"right": habits.right_number, "wrong": habits.wrong_number}, "none"),
        action=_choose(rng, {"right": habits.right_action, "wrong": habits.wrong_action}, "shrug"),
        fillers=sum(rng.random() < habits.filler for _ in range(2)),
        closing=_choose(rng, manners, "none"),
    )


def write_reply(rng: random.Random, facts: Facts, draft: Draft) -> str:
    """The draft in words: opening, order number, action, fillers, closing."""
    other = Facts(
        rng.choice([topic for topic in grammar.TOPICS if topic != facts.topic]),
        facts.item,
        rng.choice([number for number in grammar.NUMBERS if number != facts.number]),
    )
    parts = []
    if draft.opening != "none":
        parts.append(rng.choice(grammar.OPENINGS[draft.opening]))
    if draft.number != "none":
        parts.append(_fill(rng.choice(grammar.MENTIONS), facts if draft.number == "right" else other))
    if draft.action == "shrug":
        parts.append(rng.choice(grammar.SHRUGS))
    else:
        actions = grammar.TOPICS[(facts if draft.action == "right" else other).topic].actions
        parts.append(_fill(rng.choice(actions), facts))
    parts += rng.sample(grammar.FILLERS, draft.fillers)
    if draft.closing != "none":
        parts.append(rng.choice(grammar.CLOSINGS[draft.closing]))
    return " ".join(parts)


def compose_response(draft: Draft) -> str:
    """What the customer says to the reply: one sentence each on action, number and manners, plainly."""
    curt, polite = ((draft.opening, draft.closing).count(manner) for manner in ("curt", "polite"))
    tone = "polite" if polite > curt else "curt" if curt > polite else "none"
    parts = [grammar.RESPONSES_TO_ACTION[draft.action], grammar.RESPONSES_TO_NUMBER[draft.number]]
    return " ".join(
        [*parts, grammar.RESPONSES_TO_MANNERS[tone], *([grammar.RESPONSE_TO_FILLERS] if draft.fillers else [])]
    )


@cache
def _facts_of(split: str) -> tuple[Facts, ...]:
    everything = starmap(Facts, product(grammar.TOPICS, grammar.ITEMS, grammar.NUMBERS))
    return tuple(facts for facts in everything if facts.split == split)


def _choose(rng: random.Random, chances: dict[str, float], otherwise: str) -> str:
    [choice] = rng.choices([*chances, otherwise], [*chances.values(), 1 - sum(chances.values())])
    return choice


def _fill(template: str, facts: Facts) -> str:
    return template.replace("{item}", facts.item).replace("{number}", facts.number)
