"""Print to a terminal. Text from files and models must not control it."""

import sys
import unicodedata
from contextlib import suppress

JOINERS = "\u200c\u200d"  # zero-width (non-)joiner, which words and emoji need


def literal(text: str) -> str:
    """Escape control characters, escape sequences and direction marks. Joiners inside words and emoji stay."""
    # isprintable() rejects every space except the ASCII one; those of the category Zs are harmless.
    return "".join(
        c if c.isprintable() or c in JOINERS or unicodedata.category(c) == "Zs" else _escape(c) for c in text
    )


def print_line(what: str) -> None:
    """Print a line to standard error. Does nothing if the terminal is closed."""
    with suppress(OSError):
        print(f"keel: {literal(what)}", file=sys.stderr, flush=True)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
