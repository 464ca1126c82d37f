"""Names of scorers and slices in the keys of metrics: each is unique, and can be read back from the key."""

import re
from collections.abc import Collection
from itertools import count

ENDS = ("_low", "_high")
"""suffixes of the two ends of a metric's interval"""


def clean_name(text: str) -> str:
    """Replace the characters that separate the parts of a metric's key or of a path. The result may be empty."""
    return re.sub(r"[^\w.-]+", "_", text).strip("_.-")


def clashing_name(name: str, taken: Collection[str]) -> str | None:
    """Return the name in `taken` that `name` clashes with, or None.

    Two names clash if they are equal, or if one is an end of the other's interval.
    """
    for other in taken:
        if name == other or any(name == other + end or other == name + end for end in ENDS):
            return other
    return None


def free_name(name: str, taken: Collection[str]) -> str:
    """Return the first of f, f_2, f_3, ... that clashes with no name in `taken`."""
    candidates = (name if number == 1 else f"{name}_{number}" for number in count(1))
    return next(candidate for candidate in candidates if clashing_name(candidate, taken) is None)
