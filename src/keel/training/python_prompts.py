"""Prompts handed over in Python, read as those of a file are."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import PurePath
from typing import Any

from transformers import PreTrainedTokenizerBase

from keel.config import PromptSettings
from keel.data.prompts import Prompt
from keel.data.rows import Row
from keel.errors import ConfigError, DataError
from keel.models.prompt_reading import read_prompts

GIVEN = "prompts given in Python"
"""Stands where settings and errors name the file."""


def with_place(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run whose prompts are given: `prompts.path` may be missing."""
    section = config.get("prompts") or {}
    return {**config, "prompts": {"path": GIVEN, **section} if isinstance(section, Mapping) else section}


def load_given(settings: PromptSettings, tokenizer: PreTrainedTokenizerBase, prompts: Any) -> list[Prompt]:
    """The prompts given in Python; those of the settings' file where there are none (None)."""
    if prompts is None:
        return read_prompts(settings, tokenizer)
    if isinstance(prompts, list) and prompts and all(isinstance(prompt, Prompt) for prompt in prompts):
        return list(prompts)
    return read_prompts(settings, tokenizer, GIVEN, rows=rows_of(prompts, settings.column))


def rows_of(prompts: Any, column: str) -> list[Row]:
    """Copies of the rows of a list, or of a data set of the package datasets: texts, chats, or mappings with columns.

    Raises ConfigError for anything else, DataError for an item that is none of them.
    """
    rows = [
        Row(number, _copied(_values(prompt, column, number), number))
        for number, prompt in enumerate(_items(prompts), start=1)
    ]
    if not rows:
        raise ConfigError("no prompts", where="prompts", fix="give at least one")
    return rows


def _items(prompts: Any) -> Sequence[Any]:
    if isinstance(prompts, str | bytes | PurePath):
        raise ConfigError("a text or path where a list of prompts belongs", "prompts", "name a file in prompts.path")
    if isinstance(prompts, Sequence):
        return prompts
    from datasets import Dataset

    if isinstance(prompts, Dataset):
        return list(prompts)
    kind = type(prompts).__name__
    fix = "give frame.to_dict('records')" if kind == "DataFrame" else "give a list of texts, chats or rows"
    raise ConfigError(f"expected a list or a datasets.Dataset, got {kind}", where="prompts", fix=fix)


def _values(prompt: Any, column: str, number: int) -> dict[str, Any]:
    if isinstance(prompt, Mapping):
        return dict(prompt)
    if isinstance(prompt, str | list):
        return {column: prompt}
    kind = type(prompt).__name__
    raise DataError(f"expected text, a list of messages or a row of columns, got {kind}", where=f"{GIVEN}:{number}")


def _copied(values: dict[str, Any], number: int) -> dict[str, Any]:
    """A copy of a row. Raises DataError for one that no file could hold, or that reward functions cannot get."""
    where = f"{GIVEN}:{number}"
    for name, value in values.items():
        if not isinstance(name, str):
            raise DataError(f"a column is called {name!r}, which is no text", where=where, fix="rename it")
        try:
            json.dumps(value, ensure_ascii=False, default=repr).encode()  # half of a surrogate pair is no text
            values[name] = deepcopy(value)
        except UnicodeEncodeError as error:
            raise DataError(f'"{name}" holds something that is no Unicode text', where=where) from error
        except Exception as error:  # somebody else's object may raise anything
            reason = f"{type(error).__name__}: {error}"
            raise DataError(
                f'"{name}" cannot be copied and written down ({reason})', where, "give plain values"
            ) from error
    return values


def fingerprint_of(prompts: Sequence[Prompt]) -> str:
    """The SHA-256 of their contents and columns."""
    rows = [[prompt.content, prompt.columns] for prompt in prompts]
    return hashlib.sha256(json.dumps(rows, default=repr).encode()).hexdigest()
