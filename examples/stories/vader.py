"""How cheerful a text is, by the VADER lexicon (Hutto and Gilbert 2014): 7,500 words that ten people each rated.

`valence` is a reward function with TRL's signature. The lexicon is the file named by the environment variable
VADER_LEXICON; the Python package `vaderSentiment` contains it as `vader_lexicon.txt`.
"""

import os
import re
from pathlib import Path

WORD = re.compile(r"[a-z]+(?:'[a-z]+)*")
NEGATIONS = {"no", "not", "never", "nothing", "nobody", "without", "cannot"}
NEGATED = -0.74  # "not happy" is a little less sad than "happy" is happy
ALPHA = 15.0


def read_lexicon(path: Path) -> dict[str, float]:
    """Mean rating of each word, -4 to 4; emoticons and phrases are left out."""
    if not path.is_file():
        raise FileNotFoundError(f"no lexicon at {path}: set VADER_LEXICON to a vader_lexicon.txt")
    columns = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    return {column[0]: float(column[1]) for column in columns if WORD.fullmatch(column[0])}


LEXICON = read_lexicon(Path(os.environ.get("VADER_LEXICON", "data/vader_lexicon.txt")))


def compound(text: str) -> float:
    """VADER's measure of a whole text: s / sqrt(s^2 + 15), in (-1, 1), where s is the sum of its words' ratings.

    A word counts the other way when one of the three words before it is a negation. The sum alone would pay for every
    further happy word; this saturates, so that ever more of them, or a longer text, gain ever less.
    """
    words = WORD.findall(text.lower())
    total = sum(LEXICON[word] * _sign(words[max(0, i - 3) : i]) for i, word in enumerate(words) if word in LEXICON)
    return total / (total * total + ALPHA) ** 0.5


def valence(completions: list[str], **_: object) -> list[float]:
    """The reward: `compound` of each answer, without its prompt."""
    return [compound(completion) for completion in completions]


def _sign(before: list[str]) -> float:
    return NEGATED if any(word in NEGATIONS or word.endswith("n't") for word in before) else 1.0
