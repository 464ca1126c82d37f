"""Novelty of a prompt: the share of its word pairs that no training prompt has."""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from keel.data.rows import Content
from keel.data.turn_text import content_text


def word_pairs(prompt: Content) -> set[tuple[str, ...]]:
    """Return all pairs of neighbouring words or punctuation marks, in lower case; a single word is returned alone."""
    words = re.findall(r"\w+|[^\w\s]", content_text(prompt).lower())
    return set(pairwise(words)) or {tuple(words)}


class PromptWordPairs:
    """The word pairs of the training prompts."""

    def __init__(self, prompts: Sequence[Content]) -> None:
        self.pairs = Counter(pair for prompt in prompts for pair in word_pairs(prompt))

    def novelty(self, prompt: Content, is_one_of_them: bool = False) -> float:
        """Return the share of the prompt's word pairs that no training prompt has, 0 to 1.

        Args:
            is_one_of_them: the prompt is a training prompt, and only the others count.
        """
        pairs = word_pairs(prompt)
        return sum(self.pairs[pair] <= is_one_of_them for pair in pairs) / len(pairs)
