"""Rows of data given in Python, as those of a file."""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from hashlib import sha256
from pathlib import Path, PurePath
from typing import Any

from keel.data.rows import Row
from keel.errors import ConfigError, DataError


def rows_from_python(values: Any, name: str, text_column: str, chat_column: str) -> list[Row]:
    """Copy the rows of a list or of a datasets.Dataset: mappings with columns, texts, or chats.

    Args:
        name: what errors call the rows, as in "prompts".
        text_column, chat_column: the column of an item that is a text, or a list of messages.

    Raises ConfigError for anything but a list or a Dataset, DataError for an item that is none of these.
    """
    given = given_in_python(name)
    rows = [
        Row(number, _copied(_columns(value, text_column, chat_column, f"{given}:{number}"), f"{given}:{number}"))
        for number, value in enumerate(_items(values, name), start=1)
    ]
    if not rows:
        raise ConfigError(f"no {name}", where=name, fix="give at least one")
    return rows


def given_in_python(name: str) -> str:
    """What settings and errors name in place of a file."""
    return f"{name} given in Python"


def write_rows(values: Any, folder: Path, name: str, text_column: str, chat_column: str) -> Path:
    """Write rows given in Python to a JSON lines file, whose name depends on its content. Returns its path.

    Raises ConfigError or DataError for rows that a file cannot hold.
    """
    rows = rows_from_python(values, name, text_column, chat_column)
    try:
        content = "".join(json.dumps(row.values, ensure_ascii=False) + "\n" for row in rows).encode()
    except (TypeError, ValueError) as error:
        raise DataError(
            f"a row cannot be written as JSON: {error}", given_in_python(name), "give plain values"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{sha256(content).hexdigest()[:12]}.jsonl"
    path.write_bytes(content)
    return path


def _items(values: Any, name: str) -> Sequence[Any]:
    if isinstance(values, str | bytes | PurePath):
        raise ConfigError(f"a text or path where a list of {name} belongs", name, f"name a file in {name}.path")
    if isinstance(values, Sequence):
        return values
    from datasets import Dataset

    if isinstance(values, Dataset):
        return list(values)
    kind = type(values).__name__
    fix = "give frame.to_dict('records')" if kind == "DataFrame" else "give a list of texts, chats or rows"
    raise ConfigError(f"expected a list or a datasets.Dataset, got {kind}", where=name, fix=fix)


def _columns(value: Any, text_column: str, chat_column: str, where: str) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, str | list):
        return {text_column if isinstance(value, str) else chat_column: value}
    kind = type(value).__name__
    raise DataError(f"expected text, a list of messages or a row of columns, got {kind}", where=where)


def _copied(values: dict[str, Any], where: str) -> dict[str, Any]:
    """A copy of a row. Raises DataError for one that no file could hold, or that reward functions cannot get."""
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
