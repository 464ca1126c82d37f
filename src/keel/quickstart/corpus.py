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
    wrong_number: float  # otherwise no number
    polite: float
    curt: float  # otherwise neither; for opening and closing alike
    filler: float  # chance of one more filler sentence, two at most


PRETRAINING = Habits(0.70, 0.15, 0.80, 0.05, 0.40, 0.30, 0.25)
MEDIOCRE = Habits(0.45, 0.30, 0.45, 0.20, 0.40, 0.30, 0.40)


def pretraining_corpus(seed: int, n: int) -> list[str]:
    """n texts, each a message, a reply and the end token."""
    return [f"{prompt} {reply}{END}" for prompt, reply in _dialogues(seed, n, PRETRAINING)]


def sft_data(seed: int, n: int) -> list[dict[str, str]]:
    """n rows of prompt and completion; the completions are a mediocre crowd's."""
    return [{"prompt": prompt, "completion": reply} for prompt, reply in _dialogues(seed, n, MEDIOCRE)]


def prompts(seed: int, n: int, split: str) -> list[str]:
    """n different messages of one of SPLITS; no two splits share the facts of a message."""
    rng = random.Random(f"prompts {seed} {split}")
    found: dict[str, None] = {}  # a dict keeps the order, a set does not
    while len(found) < n:
        found[_write_prompt(rng, rng.choice(_facts_of(split)))] = None
    return list(found)


def _dialogues(seed: int, n: int, habits: Habits) -> list[tuple[str, str]]:
    rng = random.Random(f"dialogues {seed}")
    drawn = rng.choices(_facts_of("sft"), k=n)
    return [(_write_prompt(rng, facts), write_reply(rng, facts, habits)) for facts in drawn]


@cache
def _facts_of(split: str) -> tuple[Facts, ...]:
    everything = starmap(Facts, product(grammar.TOPICS, grammar.ITEMS, grammar.NUMBERS))
    return tuple(facts for facts in everything if facts.split == split)


def _write_prompt(rng: random.Random, facts: Facts) -> str:
    """The message; it ends in "agent:", so that the reply's first word is a token of its own."""
    parts = [rng.choice(grammar.TOPICS[facts.topic].problems)]
    if rng.random() < 0.5:
        parts.insert(0, rng.choice(grammar.GREETINGS))
    if facts.topic != "thanks" and rng.random() < 0.5:
        parts.append(rng.choice(grammar.MOODS))
    parts.append(rng.choice(grammar.REFERENCES))
    return _fill(" ".join([grammar.CUSTOMER, *parts, grammar.AGENT]), facts.item, facts.number)


def write_reply(rng: random.Random, facts: Facts, habits: Habits) -> str:
    """One reply: opening, order number, action, fillers, closing, each of chance quality or left out."""
    parts = [
        _manner(rng, habits, grammar.POLITE_OPENINGS, grammar.CURT_OPENINGS),
        _mention(rng, facts, habits),
        _action(rng, facts, habits),
    ]
    for _ in range(2):
        parts.append(rng.choice(grammar.FILLERS) if parts[-1] and rng.random() < habits.filler else "")
    parts.append(_manner(rng, habits, grammar.POLITE_CLOSINGS, grammar.CURT_CLOSINGS))
    return " ".join(filter(None, parts))


def _manner(rng: random.Random, habits: Habits, polite: tuple[str, ...], curt: tuple[str, ...]) -> str:
    [pool] = rng.choices([polite, curt, ("",)], [habits.polite, habits.curt, 1 - habits.polite - habits.curt])
    return rng.choice(pool)


def _mention(rng: random.Random, facts: Facts, habits: Habits) -> str:
    others = [number for number in grammar.NUMBERS if number != facts.number]
    neither = 1 - habits.right_number - habits.wrong_number
    weights = [habits.right_number, habits.wrong_number, neither]
    [number] = rng.choices([facts.number, rng.choice(others), ""], weights)
    return rng.choice(grammar.MENTIONS).replace("{number}", number) if number else ""


def _action(rng: random.Random, facts: Facts, habits: Habits) -> str:
    others = [topic for topic in grammar.TOPICS if topic != facts.topic]
    shrug = 1 - habits.right_action - habits.wrong_action
    right, wrong = grammar.TOPICS[facts.topic].actions, grammar.TOPICS[rng.choice(others)].actions
    [pool] = rng.choices([right, wrong, grammar.SHRUGS], [habits.right_action, habits.wrong_action, shrug])
    return _fill(rng.choice(pool), facts.item, facts.number)


def _fill(template: str, item: str, number: str) -> str:
    return template.replace("{item}", item).replace("{number}", number)
