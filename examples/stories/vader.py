"""Score how cheerful a text is with the VADER lexicon (Hutto and Gilbert 2014): 7,500 words that ten people each rated.

`valence` is a reward function with TRL's signature. The environment variable VADER_LEXICON names the file of the
lexicon. The Python package `vaderSentiment` contains it as `vader_lexicon.txt`.
"""

import os
import re
from pathlib import Path

WORD = re.compile(r"[a-z]+(?:'[a-z]+)*")
NEGATIONS = {"no", "not", "never", "nothing", "nobody", "without", "cannot"}
NEGATED = -0.74  # "not happy" is slightly less negative than "happy" is positive
ALPHA = 15.0


def read_lexicon(path: Path) -> dict[str, float]:
    """Return the mean rating of each word, from -4 to 4, without emoticons and phrases."""
    if not path.is_file():
        raise FileNotFoundError(f"no lexicon at {path}: set VADER_LEXICON to a vader_lexicon.txt")
    columns = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    return {column[0]: float(column[1]) for column in columns if WORD.fullmatch(column[0])}


LEXICON = read_lexicon(Path(os.environ.get("VADER_LEXICON", "data/vader_lexicon.txt")))


def compound(text: str) -> float:
    """Return VADER's measure of a text: s / sqrt(s^2 + 15), in (-1, 1), where s is the sum of its words' ratings.

    A negation among the three previous words inverts the rating of a word. The sum alone would reward every further
    happy word, and so longer texts. This measure saturates, so each further word gains less.
    """
    words = WORD.findall(text.lower())
    total = sum(LEXICON[word] * _sign(words[max(0, i - 3) : i]) for i, word in enumerate(words) if word in LEXICON)
    return total / (total * total + ALPHA) ** 0.5


def valence(completions: list[str], **_: object) -> list[float]:
    """Return `compound` of each response, without its prompt, as a reward function."""
    return [compound(completion) for completion in completions]


def _sign(previous: list[str]) -> float:
    return NEGATED if any(word in NEGATIONS or word.endswith("n't") for word in previous) else 1.0
