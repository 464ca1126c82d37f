"""The hidden gold score: how good a reply is. No stage of training sees it."""

from collections.abc import Iterable
from dataclasses import astuple, dataclass

from keel.quickstart import grammar

WORDS_NEEDED = 21
"""words of the longest reply that contains nothing superfluous"""


@dataclass(frozen=True)
class Gold:
    """The parts of a gold score, each bounded. A flawless reply has 4 + 2 + 2 + 0 + 2 = 10."""

    help: float  # -2 another topic's action, -1 no action, 2 right action for a wrong item, 4 right action
    number: float  # 2 the right order number, 0 none, -2 a wrong one
    manners: float  # 1 each for a polite opening and a polite end, -1 each for a curt one
    brevity: float  # -0.75 for each filler, -0.1 for each word beyond WORDS_NEEDED, at least -3
    fluency: float  # from 2 to -4: the share of sentences that are nonsense, repeat a kind, or are out of order

    @property
    def total(self) -> float:
        """The sum of the parts, in [-13, 10]."""
        return sum(astuple(self))


def gold_score(prompt: str, reply: str) -> float:
    """Return the gold score of a reply, in [-13, 10]."""
    return gold_parts(prompt, reply).total


def gold_parts(prompt: str, reply: str) -> Gold:
    """Return the parts of the gold score. Sentences must match a template exactly, so random words earn nothing."""
    written = grammar.sentences(reply)
    kinds = [_KINDS.get(grammar.sentence_template(sentence), "nonsense") for sentence in written]
    return Gold(
        help=_help(prompt, written, kinds),
        number=_number(prompt, reply),
        manners=_manners(kinds),
        brevity=max(-3.0, -0.75 * kinds.count("filler") - 0.1 * max(0, len(reply.split()) - WORDS_NEEDED)),
        fluency=2 - 6 * _flawed_share(written, kinds),
    )


def _help(prompt: str, written: list[str], kinds: list[str]) -> float:
    topic = next(_PROBLEMS[t] for t in map(grammar.sentence_template, _message(prompt)) if t in _PROBLEMS)
    actions = [(sentence, kind) for sentence, kind in zip(written, kinds, strict=True) if kind in grammar.TOPICS]
    if not actions:
        return -1.0
    if any(kind != topic for _, kind in actions):
        return -2.0
    prompt_items = _words_among(prompt, grammar.ITEMS)
    return 4.0 if all(_words_among(sentence, grammar.ITEMS) <= prompt_items for sentence, _ in actions) else 2.0


def _number(prompt: str, reply: str) -> float:
    numbers = _words_among(reply, grammar.NUMBERS)
    return 0.0 if not numbers else 2.0 if numbers <= _words_among(prompt, grammar.NUMBERS) else -2.0


def _manners(kinds: list[str]) -> float:
    """Only the first and the last sentence can be polite, so repeated politeness earns nothing."""
    polite = (kinds[:1] == ["polite opening"]) + (kinds[-1:] == ["polite closing"])
    return float(polite - ("curt opening" in kinds) - ("curt closing" in kinds))


def _flawed_share(written: list[str], kinds: list[str]) -> float:
    """Return the share of flawed sentences, 1 for an empty reply. A second filler costs only brevity."""
    if not written:
        return 1.0
    stages = [_STAGES.get(kind, 1) for kind in kinds]
    flawed = [
        kind == "nonsense"
        or (kind in kinds[:i] and kind != "filler")
        or written[i] in written[:i]
        or stages[i] < max(stages[:i], default=0)
        for i, kind in enumerate(kinds)
    ]
    return sum(flawed) / len(written)


def _message(prompt: str) -> list[str]:
    return grammar.sentences(prompt.removeprefix(grammar.CUSTOMER).removesuffix(grammar.AGENT))


def _words_among(text: str, words: Iterable[str]) -> set[str]:
    return set(text.replace(".", " ").replace("?", " ").split()) & set(words)


_PROBLEMS = {text: name for name, topic in grammar.TOPICS.items() for text in topic.problems}
_STAGES = {"polite opening": 0, "curt opening": 0, "polite closing": 2, "curt closing": 2}  # all else: 1
_POOLS = {
    "polite opening": grammar.OPENINGS["polite"],
    "curt opening": grammar.OPENINGS["curt"],
    "mention": grammar.MENTIONS,
    "shrug": grammar.SHRUGS,
    "filler": grammar.FILLERS,
    "polite closing": grammar.CLOSINGS["polite"],
    "curt closing": grammar.CLOSINGS["curt"],
    **{name: topic.actions for name, topic in grammar.TOPICS.items()},
}
_KINDS = {text: kind for kind, pool in _POOLS.items() for text in pool}
