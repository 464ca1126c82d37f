"""Text for a terminal: what somebody else wrote does not steer it."""

import sys
import unicodedata
from contextlib import suppress

JOINERS = "\u200c\u200d"


def literal(text: str) -> str:
    """Escape control characters, escape sequences and direction marks in text that keel did not write.

    The joiners inside words and emoji stay.
    """
    return "".join(
        c if c.isprintable() or c in JOINERS or unicodedata.category(c) == "Zs" else _escape(c) for c in text
    )


def tell(what: str) -> None:
    """One line on standard error, at once. Where nobody reads any more (a closed terminal), nothing."""
    with suppress(OSError):
        print(f"keel: {literal(what)}", file=sys.stderr, flush=True)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
