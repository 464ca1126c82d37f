"""A line of rollouts.jsonl: how it is written, and how its parts are found without parsing all of it.

A line begins with short metrics, by which a reader filters and sorts millions of responses; then come the texts, then
what is known of each token: {"step": 3, "score": ..., "scores": {...}, "prompt": ..., "response": ..., "tokens": ...}.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keel.run.json_values import finite

SHORT = ("row", "rows", "score", "kl", "length", "truncated", "scores")
PROMPT, RESPONSE, TOKENS = "prompt", "response", "tokens"
ORDER = ("step", *SHORT, PROMPT, RESPONSE, TOKENS)
"""The fields that come first, in this order; the others follow."""


@dataclass(frozen=True)
class LineParts:
    """Where the parts of one line are: places in the bytes that hold it."""

    short_end: int  # the short metrics end here, without a closing brace
    prompt: int  # the prompt's JSON begins
    prompt_end: int
    texts: int  # the inside of an object with prompt and response
    texts_end: int
    end: int  # the line feed


def encode_line(step: int, row: Mapping[str, Any]) -> str:
    """Return the line of one response, its fields in the order that `find_parts` relies on."""
    values = {"step": step, **row}
    ordered = {name: values[name] for name in [*ORDER, *values] if name in values}
    return json.dumps(finite(ordered), ensure_ascii=False, allow_nan=False) + "\n"


def find_parts(data: bytes, begin: int) -> LineParts:
    """Find the parts of the line that begins at `begin`. Raises ValueError for a line in another order.

    A quote inside a JSON text is always escaped, so the first `, "prompt": ` of a line is a key.
    """
    prompt = data.find(_key(PROMPT), begin)
    response = data.find(_key(RESPONSE), prompt)
    tokens = data.find(_key(TOKENS), response)
    end = data.find(b"\n", begin)
    if not begin < prompt < response < tokens < end:
        raise ValueError("fields in another order")
    return LineParts(prompt, prompt + len(_key(PROMPT)), response, prompt + len(b", "), tokens, end)


def _key(name: str) -> bytes:
    return f', "{name}": '.encode()
