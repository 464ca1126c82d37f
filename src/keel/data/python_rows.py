"""Convert data passed from Python to rows like those of a file."""

import json
import os
import platform
from collections.abc import Iterable, Mapping, Set
from copy import deepcopy
from hashlib import sha256
from pathlib import Path, PurePath
from typing import Any

from keel.data.rows import Row
from keel.errors import ConfigError, DataError


def rows_from_python(values: Any, name: str, text_column: str, chat_column: str) -> list[Row]:
    """Copy the rows of a list, a datasets.Dataset or another iterable, which is read to its end.

    An item is a mapping of columns, a text, or a chat.

    Args:
        name: Name of the rows in errors, such as "prompts".
        text_column: Column for an item that is a text.
        chat_column: Column for an item that is a list of messages.

    Raises ConfigError for what has no rows in an order, DataError for an invalid item.
    """
    source = source_name(name)
    rows = []
    for number, value in enumerate(_items(values, name), start=1):
        where = f"{source}:{number}"
        rows.append(Row(number, _copy_columns(_columns(value, text_column, chat_column, where), where)))
    if not rows:
        raise ConfigError(f"no {name}", where=name, fix="give at least one")
    return rows


def source_name(name: str) -> str:
    """Return the name that settings and errors have in place of a path."""
    return f"{name} given in Python"


def write_rows(values: Any, folder: Path, name: str, text_column: str, chat_column: str) -> Path:
    """Write rows passed from Python to a JSON lines file, and return its path.

    The file name contains a hash of the content, so that other rows get another file.
    Raises ConfigError or DataError for rows that JSON cannot represent.
    """
    rows = rows_from_python(values, name, text_column, chat_column)
    try:
        content = "".join(json.dumps(row.values, ensure_ascii=False) + "\n" for row in rows).encode()
    except (TypeError, ValueError) as error:
        raise DataError(
            f"a row cannot be written as JSON: {error}", source_name(name), "give texts, numbers, lists or dicts"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{sha256(content).hexdigest()[:12]}.jsonl"
    # Atomic: other processes of the run, perhaps on other machines, write and read the same file.
    partial = folder / f".{path.name}-{platform.node()}-{os.getpid()}"
    partial.write_bytes(content)
    partial.replace(path)
    return path


def _items(values: Any, name: str) -> Iterable[Any]:
    if isinstance(values, str | bytes | PurePath):
        raise ConfigError(f"expected a list of {name}, got a text or a path", name, f"set {name}.path to read a file")
    kind = type(values).__name__
    if isinstance(values, Mapping):  # also a datasets.DatasetDict
        fix = "choose a split, as in data['train']" if kind.endswith("DatasetDict") else "give a list of rows"
    elif kind == "DataFrame":
        fix = "give frame.to_dict('records')"
    elif isinstance(values, Iterable) and not isinstance(values, Set):  # the order of a set is that of a process
        return values
    else:
        fix = "give a list of texts, chats or rows"
    raise ConfigError(f"expected a list, a datasets.Dataset or another iterable, got {kind}", where=name, fix=fix)


def _columns(value: Any, text_column: str, chat_column: str, where: str) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, str | list):
        return {text_column if isinstance(value, str) else chat_column: value}
    kind = type(value).__name__
    raise DataError(f"expected a text, a list of messages or a dict of columns, got {kind}", where=where)


def _copy_columns(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Copy the values of a row, so that reward functions cannot change the caller's objects.

    Raises DataError for values that a file could not hold, or that cannot be copied.
    """
    for name, value in values.items():
        if not isinstance(name, str):
            raise DataError(f"the column name {name!r} is not text", where=where, fix="rename it")
        try:
            json.dumps(value, ensure_ascii=False, default=repr).encode()  # raises for half of a surrogate pair
            values[name] = deepcopy(value)
        except UnicodeEncodeError as error:
            raise DataError(f'"{name}" contains text that is not valid Unicode', where=where) from error
        except Exception as error:  # a caller's object may raise anything
            reason = f"{type(error).__name__}: {error}"
            raise DataError(
                f'"{name}" cannot be copied ({reason})', where, "give texts, numbers, lists or dicts"
            ) from error
    return values
