"""Read rows of data files. Errors name the place of a row as `FILE:LINE`."""

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

__all__ = ["Content", "Messages"]  # other modules import them from here

CONVERSATIONS = ("messages", "conversations", "conversation")
"""Columns that hold conversations; the first one in a row is read."""

KINDS = {str: "text", list: "a list", dict: "an object", int: "a number", float: "a number", type(None): "null"}

ROWS_AT_ONCE = 16  # rows of Parquet to unpack at once

# A file that unpacks to more than both, bytes and multiples of its size, is treated as a decompression bomb.
UNPACKED, UNPACKED_TIMES = 2**30, 1000


@dataclass(frozen=True)
class Row:
    """One row of a data file."""

    number: int  # line of the file, or row of the data set, from 1
    values: dict[str, Any]


def read_rows(path: str, split: str = "train") -> list[Row]:
    """Read all rows of a .jsonl or .parquet file, or of a hub data set (`owner/name`, or `owner/name:config`).

    Raises DataError for the first line that cannot be read, or if there is no row.
    """
    rows = []
    for row in scan_rows(path, split):
        if isinstance(row, DataError):
            raise row
        rows.append(row)
    if not rows:
        raise DataError("the file has no rows", where=path)
    return rows


def scan_rows(path: str, split: str = "train") -> Iterator[Row | DataError]:
    """Yield each row, or a DataError for a line that cannot be read, so that one fault does not hide the others.

    Raises DataError if the file or the data set cannot be read at all.
    """
    file = Path(path)
    if file.suffix in (".jsonl", ".json"):
        yield from _scan_json_lines(file)
    else:
        for number, values in enumerate(_read_data_set(path, split), start=1):
            yield Row(number, dict(values))


def require(row: Row, path: str, column: str, kinds: tuple[type, ...] = (str,)) -> Any:
    """Return the value of a column, which must be of one of `kinds`. Raises DataError."""
    if column not in row.values:
        near = difflib.get_close_matches(column, row.values, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"columns: {', '.join(row.values) or 'none'}"
        reject(row, path, f'no column "{column}"; {hint}')
    value = row.values[column]
    if not isinstance(value, kinds) or isinstance(value, bool):  # a bool is an int
        expected = " or ".join(dict.fromkeys(KINDS[kind] for kind in kinds))
        reject(row, path, f'expected {expected} in "{column}", got {KINDS.get(type(value), type(value).__name__)}')
    return value


def require_content(row: Row, path: str, column: str, may_be_empty: bool = False) -> Content:
    """Return a column that holds text or chat messages. Raises DataError.

    Text of white space only is refused, except where an empty response is valid.
    """
    value = require(row, path, column, (str, list))
    if isinstance(value, str):
        if not value.strip() and not may_be_empty:
            reject(row, path, f'"{column}" is empty')
        return value
    try:
        messages = as_messages(value)
    except ValueError as error:
        reject(row, path, f'"{column}": {error}')
    # A message with a third key, such as tool_calls, is not empty.
    if not may_be_empty and not any(message["content"].strip() or len(message) > 2 for message in messages):
        reject(row, path, f'all messages in "{column}" are empty')
    return messages


def require_messages(row: Row, path: str, column: str) -> Messages:
    """Return a column that holds chat messages, at least one of them not empty. Raises DataError."""
    require(row, path, column, (list,))
    messages = require_content(row, path, column)
    assert not isinstance(messages, str)
    return messages


def row_kind(row: Row) -> str:
    """Return `text`, `completion`, or the column that holds a conversation. A column with null counts as missing."""
    if row.values.get("completion") is not None:
        return "completion"
    column = next((name for name in CONVERSATIONS if row.values.get(name) is not None), None)
    return column or ("text" if "text" in row.values and "prompt" not in row.values else "completion")


def refuse_undesirable(row: Row, path: str) -> None:
    """Raise DataError for a completion with `label: false`, which is undesirable in TRL's data for KTO."""
    if row.values.get("completion") is not None and row.values.get("label") is False:
        what = '"label" is false (an undesirable completion), and keel sft imitates every row'
        reject(row, path, f"{what}; remove this one, or use keel dpo --loss kto")


def reject(row: Row, path: str, what: str) -> NoReturn:
    raise DataError(what, where=f"{path}:{row.number}")


@contextmanager
def row_in_errors(row: Row, path: str) -> Iterator[None]:
    """Add the place of a row to a DataError of code that does not know it, such as rendering."""
    with place_in_errors(f"{path}:{row.number}"):
        yield


@contextmanager
def place_in_errors(place: str) -> Iterator[None]:
    """Add a place `FILE:LINE` to a DataError; an empty place changes nothing."""
    try:
        yield
    except DataError as error:
        if not place or error.where.startswith(place.rpartition(":")[0] + ":"):
            raise
        origin = f" ({error.where})" if error.where else ""
        raise DataError(f"{error.what}{origin}", where=place, fix=error.fix) from error


def _scan_json_lines(file: Path) -> Iterator[Row | DataError]:
    try:
        with _memory_error_explained(str(file)):
            # Split bytes at \n: str.splitlines() would also split at U+2028 inside a text.
            lines = read_regular(file).removeprefix(b"\xef\xbb\xbf").split(b"\n")  # without a byte order mark
    except OSError as error:
        raise DataError(error.strerror or str(error), where=str(file), fix="give a file that exists") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _json_row(line, number, str(file))


def _json_row(line: bytes, number: int, path: str) -> Row | DataError:
    where = f"{path}:{number}"
    try:
        values = json.loads(line, parse_constant=_refuse_constant, object_pairs_hook=_refuse_duplicate_keys)
        if b"\\ud" in line.lower():  # half of a surrogate pair is valid JSON, but not text
            json.dumps(values, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeError) else f"not JSON: {error}"
        return DataError(reason, where=where, fix="write one JSON object per line")
    if not isinstance(values, dict):
        return DataError(f"expected an object, got {KINDS.get(type(values), type(values).__name__)}", where=where)
    return Row(number, values)


def _read_parquet(path: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a Parquet file. It may unpack to many times its size, so unpack in steps and count."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with open_regular(path) as file, _memory_error_explained(path):
            batches = ParquetFile(file).iter_batches(ROWS_AT_ONCE)
            yield from _limit_size((row for batch in batches for row in batch.to_pylist()), path)
    except (OSError, pyarrow.ArrowException) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"cannot read it: {reason}", path, "give a .jsonl or .parquet file") from error


@contextmanager
def _memory_error_explained(path: str) -> Iterator[None]:
    """Raise DataError in place of MemoryError."""
    try:
        yield
    except MemoryError as error:
        raise DataError("the rows do not fit into memory", where=path, fix="split the file") from error


def _limit_size(rows: Iterable[Mapping[str, Any]], path: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows. Raise DataError before their texts take half of the memory, or far more than the file."""
    limit = min(machine_memory() / 2, max(UNPACKED, UNPACKED_TIMES * Path(path).stat().st_size))
    remaining = limit
    for row in rows:
        remaining -= _num_characters(row)
        if remaining < 0:
            raise DataError(f"the rows unpack to more than {limit / 1e9:.1f} GB", path, "split the file")
        yield row


def _num_characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_num_characters, value.values()))
    return sum(map(_num_characters, value)) if isinstance(value, list) else 0


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return values


def _read_data_set(path: str, split: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a Parquet file or a hub data set. Streaming writes no copy to a cache."""
    if path.startswith((".", "/", "~")) and not Path(path).exists():
        raise DataError("no such file", where=path)
    if Path(path).exists() and not Path(path).is_dir() and not path.endswith(".parquet"):
        raise DataError("the file is neither .jsonl nor .parquet", where=path, fix="convert it to JSON lines")
    if path.endswith(".parquet"):
        yield from _read_parquet(path)
        return
    import datasets

    name, _, config = path.partition(":")
    try:
        with _memory_error_explained(path):
            yield from datasets.load_dataset(name, config or None, split=split, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"cannot read it: {reason}", where=path, fix="give a .jsonl or .parquet file or a hub id such as org/name"
        ) from error
