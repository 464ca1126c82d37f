"""The format of a line of rollouts.jsonl: write a line, and find its parts without parsing all of it.

A line begins with short metrics, by which a reader filters and sorts millions of responses. The texts follow, then the
numbers of each token: {"step": 3, "score": ..., "scores": {...}, "prompt": ..., "response": ..., "tokens": ...}.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keel.run.json_values import replace_non_finite

SHORT = ("row", "rows", "score", "kl", "length", "truncated", "scores")
PROMPT, RESPONSE, TOKENS = "prompt", "response", "tokens"
ORDER = ("step", *SHORT, PROMPT, RESPONSE, TOKENS)
"""The first fields of a line, in this order. All other fields follow."""


@dataclass(frozen=True)
class LineParts:
    """Byte offsets of the parts of one line."""

    short_end: int  # end of the short metrics, without a closing brace
    prompt: int  # begin of the prompt's JSON
    prompt_end: int
    texts: int  # begin of `"prompt": ..., "response": ...`, without braces
    texts_end: int
    end: int  # the line feed


def encode_line(step: int, row: Mapping[str, Any]) -> str:
    """Encode one response as a line, with the fields in the order that `find_parts` relies on."""
    values = {"step": step, **row}
    ordered = {name: values[name] for name in [*ORDER, *values] if name in values}
    return json.dumps(replace_non_finite(ordered), ensure_ascii=False, allow_nan=False) + "\n"


def find_parts(data: bytes, begin: int) -> LineParts:
    """Find the parts of the line that begins at `begin`. Raises ValueError for another order of the fields."""
    # A quote inside a JSON string is always escaped, so the first `, "prompt": ` of a line is a key.
    prompt = data.find(_key(PROMPT), begin)
    response = data.find(_key(RESPONSE), prompt)
    tokens = data.find(_key(TOKENS), response)
    end = data.find(b"\n", begin)
    if not begin < prompt < response < tokens < end:
        raise ValueError("fields in another order")
    return LineParts(prompt, prompt + len(_key(PROMPT)), response, prompt + len(b", "), tokens, end)


def _key(name: str) -> bytes:
    return f', "{name}": '.encode()
