"""Slices: the prompts that have the same value in a column."""

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from keel.config import suggestion
from keel.data.prompts import Prompt
from keel.errors import ConfigError

MOST = 100  # values of a column; columns with more, such as ids and names, make slices of single prompts


def slice_rows(prompts: Sequence[Prompt], columns: Sequence[str]) -> dict[str, list[int]]:
    """Return the rows of each slice `COLUMN=VALUE`, the largest slice of a column first.

    Prompts without the column have the value null. Raises ConfigError for a column that no prompt has, or that has too
    many values.
    """
    slices: dict[str, list[int]] = {}
    known = list(dict.fromkeys(name for prompt in prompts for name in prompt.columns))
    for column in columns:
        if column not in known:
            hint = suggestion(column, known) if known else "the prompts have no other columns"
            raise ConfigError(f"no prompt has a column {column!r}; {hint}", where="slices")
        rows: dict[str, list[int]] = defaultdict(list)
        for row, prompt in enumerate(prompts):
            rows[f"{column}={value_name(prompt.columns.get(column))}"].append(row)
        if len(rows) > MOST:
            raise ConfigError(
                f"column {column!r} has {len(rows)} values; slices are for at most {MOST}", where="slices"
            )
        slices |= dict(sorted(rows.items(), key=lambda item: -len(item[1])))
    return slices


def value_name(value: Any) -> str:
    """Return the name of a value: text unchanged, other values as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
