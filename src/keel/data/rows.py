"""Rows of a data file. Whatever is wrong with one is said as `file:line`."""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from keel.data.messages import Content, Messages, as_messages
from keel.errors import DataError
from keel.files import machine_memory, open_regular, read_regular

__all__ = ["Content", "Messages"]  # the rest of the package knows them by this module

CONVERSATIONS = ("messages", "conversations", "conversation")
"""Columns that hold whole conversations; the first that a row has is read."""

KINDS = {str: "text", list: "a list", dict: "an object", int: "a number", float: "a number", type(None): "null"}


ROWS_AT_ONCE = 16  # unpacked from Parquet
UNPACKED, UNPACKED_TIMES = (
    2**30,
    1000,
)  # a file whose rows take more than both of these, in bytes and in its sizes, is a trap


@dataclass(frozen=True)
class Row:
    """One row of a data file."""

    number: int  # line of the file (or row of the data set), from 1
    values: dict[str, Any]


def read_rows(path: str, split: str = "train") -> list[Row]:
    """All rows of a .jsonl or .parquet file, or of a hub data set (`owner/name`, or `owner/name:config`).

    Raises DataError when it cannot be read, naming the line, or has no row.
    """
    rows = []
    for row in scan_rows(path, split):
        if isinstance(row, DataError):
            raise row
        rows.append(row)
    if not rows:
        raise DataError("no rows in it", where=path)
    return rows


def scan_rows(path: str, split: str = "train") -> Iterator[Row | DataError]:
    """Each row, or what is wrong with its line: one broken line does not hide the others.

    Raises DataError when the file or the data set cannot be read at all.
    """
    file = Path(path)
    if file.suffix in (".jsonl", ".json"):
        yield from _scan_json_lines(file)
    else:
        for number, values in enumerate(_read_data_set(path, split), start=1):
            yield Row(number, dict(values))


def require(row: Row, path: str, column: str, kinds: tuple[type, ...] = (str,)) -> Any:
    """The value of a column, which must be of one of `kinds`. Raises DataError."""
    if column not in row.values:
        near = difflib.get_close_matches(column, row.values, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"columns: {', '.join(row.values) or 'none'}"
        reject(row, path, f'no column "{column}"; {hint}')
    value = row.values[column]
    if not isinstance(value, kinds) or isinstance(value, bool):
        expected = " or ".join(dict.fromkeys(KINDS[kind] for kind in kinds))
        reject(row, path, f'expected {expected} in "{column}", got {KINDS.get(type(value), type(value).__name__)}')
    return value


def require_content(row: Row, path: str, column: str, may_be_empty: bool = False) -> Content:
    """Text (not just white space, unless an empty answer is an answer) or chat messages. Raises DataError."""
    value = require(row, path, column, (str, list))
    if isinstance(value, str):
        if not value.strip() and not may_be_empty:
            reject(row, path, f'"{column}" is empty')
        return value
    try:
        messages = as_messages(value)
    except ValueError as error:
        reject(row, path, f'"{column}": {error}')
    if not may_be_empty and not any(message["content"].strip() or len(message) > 2 for message in messages):
        reject(row, path, f'no message in "{column}" says anything')
    return messages


def require_messages(row: Row, path: str, column: str) -> Messages:
    """Chat messages, of which at least one has content. Raises DataError."""
    require(row, path, column, (list,))
    messages = require_content(row, path, column)
    assert not isinstance(messages, str)
    return messages


def row_kind(row: Row) -> str:
    """Return `text`, `completion`, or the column that holds a conversation. A column of nulls is none."""
    if row.values.get("completion") is not None:
        return "completion"
    column = next((name for name in CONVERSATIONS if row.values.get(name) is not None), None)
    return column or ("text" if "text" in row.values and "prompt" not in row.values else "completion")


def refuse_undesirable(row: Row, path: str) -> None:
    """Raise DataError for a completion that the row labels undesirable, as TRL's data for KTO do."""
    if row.values.get("completion") is not None and row.values.get("label") is False:
        reject(row, path, '"label" is false: an undesirable completion, and keel sft imitates every row; leave it out')


def reject(row: Row, path: str, what: str) -> NoReturn:
    raise DataError(what, where=f"{path}:{row.number}")


@contextmanager
def naming(row: Row, path: str) -> Iterator[None]:
    """Let an error about a row say which row that is: a tokenizer knows itself only."""
    with naming_place(f"{path}:{row.number}"):
        yield


@contextmanager
def naming_place(place: str) -> Iterator[None]:
    """The same for a row known by its place, `FILE:LINE`; the empty place names nothing."""
    try:
        yield
    except DataError as error:
        if not place or error.where.startswith(place.rpartition(":")[0] + ":"):
            raise
        owner = f" ({error.where})" if error.where else ""
        raise DataError(f"{error.what}{owner}", where=place, fix=error.fix) from error


def _scan_json_lines(file: Path) -> Iterator[Row | DataError]:
    try:
        with _fitting(str(file)):
            lines = read_regular(file).removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(error.strerror or str(error), where=str(file), fix="give a file that exists") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _json_row(line, number, str(file))


def _json_row(line: bytes, number: int, path: str) -> Row | DataError:
    where = f"{path}:{number}"
    try:
        values = json.loads(line, parse_constant=_refuse, object_pairs_hook=_once_each)
        if b"\\ud" in line.lower():  # half of a surrogate pair is JSON, but no text
            json.dumps(values, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeError) else f"not JSON: {error}"
        return DataError(reason, where=where, fix="one JSON object a line")
    if not isinstance(values, dict):
        return DataError(f"expected an object, got {KINDS.get(type(values), type(values).__name__)}", where=where)
    return Row(number, values)


def _read_parquet(path: str) -> Iterator[Mapping[str, Any]]:
    """Rows of a Parquet file, which can hold many times its size: it is unpacked a little at a time and counted."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with open_regular(path) as file, _fitting(path):
            batches = ParquetFile(file).iter_batches(ROWS_AT_ONCE)
            yield from _counted((row for batch in batches for row in batch.to_pylist()), path)
    except (OSError, pyarrow.ArrowException) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"cannot read it: {reason}", path, "give a .jsonl or .parquet file") from error


@contextmanager
def _fitting(path: str) -> Iterator[None]:
    """Raises DataError where the rows of a file do not fit into memory."""
    try:
        yield
    except MemoryError as error:
        raise DataError("its rows do not fit into memory", where=path, fix="give a part of them") from error


def _counted(rows: Iterable[Mapping[str, Any]], path: str) -> Iterator[Mapping[str, Any]]:
    """The same rows. Raises DataError before their texts take half of the memory, or far more than the file."""
    limit = min(machine_memory() / 2, max(UNPACKED, UNPACKED_TIMES * Path(path).stat().st_size))
    left = limit
    for row in rows:
        left -= _size(row)
        if left < 0:
            raise DataError(f"its rows unpack to more than {limit / 1e9:.1f} GB", path, "give a part of them")
        yield row


def _size(value: Any) -> int:
    """Characters of all the texts in a value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 0


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands in it twice")
    return values


def _read_data_set(path: str, split: str) -> Iterator[Mapping[str, Any]]:
    """Rows of a Parquet file or a hub data set, streamed so that no copy is written to a cache."""
    if path.startswith((".", "/", "~")) and not Path(path).exists():
        raise DataError("no such file", where=path)
    if Path(path).exists() and not Path(path).is_dir() and not path.endswith(".parquet"):
        raise DataError("neither .jsonl nor .parquet", where=path, fix="write its rows as JSON lines")
    if path.endswith(".parquet"):
        yield from _read_parquet(path)
        return
    import datasets

    name, _, config = path.partition(":")
    try:
        with _fitting(path):
            yield from datasets.load_dataset(name, config or None, split=split, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"cannot read it: {reason}", where=path, fix="give a .jsonl or .parquet file or a hub id such as org/name"
        ) from error
