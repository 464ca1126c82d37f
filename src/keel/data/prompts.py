"""Rows of a data file, and prompts as the policy reads them. Whatever is wrong with a row is said as `file:line`."""

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from transformers import PreTrainedTokenizerBase

from keel.data.templates import template_of
from keel.errors import DataError

Messages = list[dict[str, str]]
Content = str | Messages
"""A prompt as the file has it: text, or chat messages `{"role": ..., "content": ...}`."""

KINDS = {str: "text", list: "a list", dict: "an object", int: "a number", float: "a number", type(None): "null"}


@dataclass(frozen=True)
class Row:
    """One row of a data file."""

    number: int  # line of the file (or row of the data set), from 1
    values: dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One prompt in all its forms."""

    content: Content  # as in the file
    text: str  # what the policy reads: the content, or the chat template rendered up to where the answer begins
    tokens: tuple[int, ...]  # the text, tokenised once; answers are appended to these ids
    columns: dict[str, Any]  # the row's other columns, for reward functions


def read_rows(path: str, split: str = "train") -> list[Row]:
    """All rows of a .jsonl or .parquet file, or of a hub data set (`owner/name`, or `owner/name:config`).

    Raises DataError when it cannot be read, naming the line, or has no row.
    """
    file = Path(path)
    if file.suffix in (".jsonl", ".json"):
        rows = list(_read_json_lines(file))
    else:
        rows = [Row(number, dict(values)) for number, values in enumerate(_read_data_set(path, split), start=1)]
    if not rows:
        raise DataError("no rows in it", where=path)
    return rows


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
    if not value or not all(_is_message(message) for message in value):
        reject(row, path, f'"{column}" is no list of messages {{"role": text, "content": text}}')
    return value


def reject(row: Row, path: str, what: str) -> NoReturn:
    raise DataError(what, where=f"{path}:{row.number}")


def load_prompts(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str = "train",
    column: str = "prompt",
    max_tokens: int = 512,
    too_long: str = "error",
) -> list[Prompt]:
    """The prompts of a file. `too_long`: error, drop, or truncate (which keeps a prompt's end).

    Raises DataError for a bad row, a prompt that is too long and not to be shortened, or when none is left.
    """
    prompts, long = [], []
    for row in read_rows(path, split):
        content = require_content(row, path, column)
        others = {name: value for name, value in row.values.items() if name != column}
        prompt = encode_prompt(content, tokenizer, others)
        if len(prompt.tokens) > max_tokens:
            long.append(row.number)
            if too_long != "truncate":
                continue
            prompt = _keep_end(prompt, tokenizer, max_tokens)
        prompts.append(prompt)
    if long and too_long == "error":
        lines = ", ".join(map(str, long[:5])) + (", ..." if len(long) > 5 else "")
        raise DataError(
            f"{len(long)} prompts have more than {max_tokens} tokens (lines {lines})",
            where=path,
            fix="raise prompts.max_tokens, or set prompts.too_long to drop or truncate",
        )
    if not prompts:
        raise DataError(f"all prompts have more than {max_tokens} tokens", where=path, fix="raise prompts.max_tokens")
    return prompts


def encode_prompt(
    content: Content, tokenizer: PreTrainedTokenizerBase, columns: Mapping[str, Any] | None = None
) -> Prompt:
    """Text as the tokenizer starts a text (without the end some add); a chat through the template, nothing added."""
    if isinstance(content, str):
        text, tokens = content, encode_text(content, tokenizer)
    else:
        text = render_chat(content, tokenizer, add_generation_prompt=True)
        tokens = tokenizer.encode(text, add_special_tokens=False)
    return Prompt(content, text, tuple(tokens), dict(columns or {}))


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a text that goes on: with the special tokens the tokenizer puts before it, not those it puts after."""
    full, bare = tokenizer.encode(text), tokenizer.encode(text, add_special_tokens=False)
    starts = (i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare)
    return full[: next(starts, 0) + len(bare)]


def render_chat(messages: Messages, tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False) -> str:
    """A conversation as text. Raises DataError when the tokenizer has no chat template, or one that refuses it."""
    if not tokenizer.chat_template:
        raise DataError(
            "the data holds chat messages, but the tokenizer has no chat template",
            where=tokenizer.name_or_path,
            fix="use a chat model, or give prompts as text",
        )
    return template_of(tokenizer, str(tokenizer.chat_template)).render(messages, add_generation_prompt)


def _keep_end(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Prompt:
    """Drop tokens from the front, but not the special ones that start a text."""
    bare = tokenizer.encode(prompt.text, add_special_tokens=False)
    start = prompt.tokens[: max(0, len(prompt.tokens) - len(bare))]
    end = prompt.tokens[len(prompt.tokens) - (max_tokens - len(start)) :]
    text = str(tokenizer.decode(list(end)))
    return Prompt(text if isinstance(prompt.content, str) else prompt.content, text, start + end, prompt.columns)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _read_json_lines(file: Path) -> Iterator[Row]:
    try:
        lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(error.strerror or str(error), where=str(file), fix="give a file that exists") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line, parse_constant=_refuse, object_pairs_hook=_once_each)
            if b"\\ud" in line.lower():  # half of a surrogate pair is JSON, but no text
                json.dumps(values, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            reason = "not UTF-8 text" if isinstance(error, UnicodeError) else f"not JSON: {error}"
            raise DataError(reason, where=f"{file}:{number}", fix="one JSON object a line") from error
        row = Row(number, values)
        if not isinstance(values, dict):
            reject(row, str(file), f"expected an object, got {KINDS.get(type(values), type(values).__name__)}")
        yield row


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
    if Path(path).is_file() and not path.endswith(".parquet"):
        raise DataError("neither .jsonl nor .parquet", where=path, fix="write its rows as JSON lines")
    import datasets

    name, _, config = path.partition(":")
    try:
        if path.endswith(".parquet"):
            files = {"rows": path}
            yield from datasets.load_dataset("parquet", data_files=files, split="rows", streaming=True)
        else:
            yield from datasets.load_dataset(name, config or None, split=split, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"cannot read it: {reason}", where=path, fix="give a .jsonl or .parquet file or a hub id such as org/name"
        ) from error
