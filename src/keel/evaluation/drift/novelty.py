"""How new a prompt is beside others: by the pairs of words that none of them has."""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from keel.data.rows import Content
from keel.data.turn_text import content_text


def word_pairs(prompt: Content) -> set[tuple[str, ...]]:
    """Each two neighbouring words or marks, without regard to capitals; of a text of one word, that."""
    words = re.findall(r"\w+|[^\w\s]", content_text(prompt).lower())
    return set(pairwise(words)) or {tuple(words)}


class PromptWordPairs:
    """The word pairs of some prompts."""

    def __init__(self, prompts: Sequence[Content]) -> None:
        self.pairs = Counter(pair for prompt in prompts for pair in word_pairs(prompt))

    def novelty(self, prompt: Content, is_one_of_them: bool = False) -> float:
        """Share of a prompt's word pairs that no (other) one of them has, 0 to 1."""
        pairs = word_pairs(prompt)
        return sum(self.pairs[pair] <= is_one_of_them for pair in pairs) / len(pairs)
