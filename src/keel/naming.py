"""Names under which the metrics of several parts stand side by side: each is there once, and can be read back."""

import re
from collections.abc import Collection
from itertools import count

ENDS = ("_low", "_high")
"""What the ends of an interval have after the name of their metric."""


def clean_name(text: str) -> str:
    """The text without what separates parts of a metric's key or of a path; may be empty."""
    return re.sub(r"[^\w.-]+", "_", text).strip("_.-")


def clashing(name: str, taken: Collection[str]) -> str | None:
    """The one of `taken` that this name cannot stand beside: the same, or one whose interval has this name."""
    for other in taken:
        if name == other or any(name == other + end or other == name + end for end in ENDS):
            return other
    return None


def free_name(name: str, taken: Collection[str]) -> str:
    """The name, with the first number that makes it free where it clashes with one of `taken`: f, f_2, f_3."""
    candidates = (name if number == 1 else f"{name}_{number}" for number in count(1))
    return next(candidate for candidate in candidates if clashing(candidate, taken) is None)
