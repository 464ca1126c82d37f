"""Prompts as the policy reads them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from keel.data.rows import Content, Messages, Row, read_rows, require_content
from keel.data.templates import template_of
from keel.errors import DataError


@dataclass(frozen=True)
class Prompt:
    """One prompt in all its forms."""

    content: Content  # as in the file
    text: str  # what the policy reads: the content, or the chat template rendered up to where the answer begins
    tokens: tuple[int, ...]  # the text, tokenised once; answers are appended to these ids
    columns: dict[str, Any]  # the row's other columns, for reward functions


def load_prompts(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: list[Row] | None = None,
    split: str = "train",
    column: str = "prompt",
    max_tokens: int = 512,
    too_long: str = "error",
) -> list[Prompt]:
    """The prompts of a file, or of `rows`, which errors then call `path`. `too_long`: error, drop, or truncate (which
    keeps a prompt's end).

    Raises DataError for a bad row, a prompt that is too long and not to be shortened, or when none is left.
    """
    prompts, long = [], []
    for row in read_rows(path, split) if rows is None else rows:
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
