"""Prompts as the policy reads them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from keel.data.chats import read_tools, render_chat, unwritten
from keel.data.messages import as_chat, ends_with_assistant, without_oldest_turn
from keel.data.notes import BARE, UNWRITTEN, Notes, named_lines, note_kinds, note_unwritten, remarks
from keel.data.rows import Content, Row, naming, read_rows, reject, require_content
from keel.errors import DataError


@dataclass(frozen=True)
class Prompt:
    """One prompt in all its forms."""

    content: Content  # as in the file, or what is left of it within the limit
    text: str  # what the policy reads: the content, or the chat template rendered up to where the answer begins
    tokens: tuple[int, ...]  # the text, tokenised once; answers are appended to these ids
    columns: dict[str, Any]  # the row's other columns, for reward functions


@dataclass(frozen=True)
class PromptFormat:
    """Where a row has its prompt, and how that is put to a model."""

    column: str = "prompt"
    chat: bool | None = None  # True makes a user's message of a text; None leaves it as it is, and says so
    system: str | None = None  # the system message of a conversation that has none

    def content(self, content: Content) -> Content:
        """Return a prompt as it is put. A system message needs a conversation."""
        return content if isinstance(content, str) and not self.chat else as_chat(content, self.system)

    def convert(self, content: Content, row: Row, path: str, tokenizer: Any, notes: Notes | None) -> Content:
        """The same, with a remark on what looks unintended."""
        put = self.content(content)
        if notes is not None:
            if isinstance(put, str):
                if self.system is not None:
                    notes.add(path, row.number, "a text has no system message; set chat to true")
                if self.chat is None and tokenizer.chat_template:
                    notes.add(path, row.number, BARE)
            else:
                for remark in remarks(put, tokenizer):
                    notes.add(path, row.number, remark)
        return put


AS_IT_IS = PromptFormat()


def load_prompts(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: list[Row] | None = None,
    split: str = "train",
    max_tokens: int = 512,
    too_long: str = "error",
    prompt_format: PromptFormat = AS_IT_IS,
    notes: Notes | None = None,
) -> list[Prompt]:
    """The prompts of a file, or of `rows`, which errors then call `path`. `too_long`: error, drop, or truncate. A chat
    loses its oldest turns, but never a system message or a part of one; a text loses its beginning. What scorers read
    is what is left.

    Raises DataError for a bad row, a prompt that is too long and not to be shortened, or when none is left.
    """
    prompts: list[Prompt] = []
    long, fixed = list[int](), list[int]()  # lines; of the second the last turn alone is too long
    notes = notes if notes is not None else Notes()
    rows = read_rows(path, split) if rows is None else rows
    for row in rows:
        with naming(row, path):
            prompt = read_prompt(row, path, tokenizer, prompt_format, notes)
            if len(prompt.tokens) > max_tokens:
                long.append(row.number)
                if too_long != "truncate":
                    continue
                shorter = shorten_prompt(prompt, tokenizer, max_tokens)
                if shorter is None:
                    fixed.append(row.number)
                    continue
                prompt = shorter
        prompts.append(prompt)
    _check_long(path, max_tokens, too_long, long, fixed)
    if not prompts:
        raise DataError(f"all prompts have more than {max_tokens} tokens", where=path, fix="raise prompts.max_tokens")
    for number in long:
        done = "left out" if too_long == "drop" else "shortened"
        notes.add(path, number, f"more than {max_tokens} tokens (prompts.max_tokens); {done}")
    note_kinds(path, {row.number: row.values[prompt_format.column] for row in rows}, notes)
    return prompts


def read_prompt(
    row: Row,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat = AS_IT_IS,
    notes: Notes | None = None,
) -> Prompt:
    """The prompt of a row, at its full length. Raises DataError."""
    content = prompt_format.convert(require_content(row, path, prompt_format.column), row, path, tokenizer, notes)
    others = {name: value for name, value in row.values.items() if name != prompt_format.column}
    try:
        read_tools(others)
    except ValueError as error:
        reject(row, path, str(error))
    prompt = encode_prompt(content, tokenizer, others)
    if not prompt.tokens:
        reject(
            row, path, f'the tokenizer makes no tokens of "{prompt_format.column}", so nothing can be sampled after it'
        )
    if notes is not None and not isinstance(content, str):
        note_unwritten(content, prompt.text, path, row.number, notes)
        for what in unwritten(content, tokenizer, read_tools(others)):
            notes.add(path, row.number, UNWRITTEN + what)
    return prompt


def encode_prompt(
    content: Content, tokenizer: PreTrainedTokenizerBase, columns: Mapping[str, Any] | None = None
) -> Prompt:
    """Text as the tokenizer starts a text (without the end some add); a chat through the template, nothing added.

    The template also gets the column `tools`. A chat that ends with the assistant's turn is left open there.
    """
    columns = dict(columns or {})
    if isinstance(content, str):
        text, tokens = content, encode_text(content, tokenizer)
    else:
        goes_on = ends_with_assistant(content)
        rendered = render_chat(content, tokenizer, not goes_on, tools=read_tools(columns), ended=not goes_on)
        text, tokens = rendered.text, rendered.tokens(tokenizer)
    return Prompt(content, text, tuple(tokens), columns)


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a text that continues: with the special tokens the tokenizer puts before it, not those it puts after."""
    start, rest = split_start(text, tokenizer)
    return start + rest


def split_start(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids that start every text of the tokenizer, and those of the text itself.

    A text that was rendered elsewhere may spell the start ("<s>"); it is not doubled.
    """
    full, bare = tokenizer.encode(text), tokenizer.encode(text, add_special_tokens=False)
    starts = (i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare)
    start = full[: next(starts, 0)]
    return start, bare[len(start) :] if bare[: len(start)] == start else bare


def shorten_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Prompt | None:
    """A prompt of at most so many tokens; None for a chat whose last turn has more."""
    if isinstance(prompt.content, str):
        return _keep_end(prompt, tokenizer, max_tokens)
    content: Content | None = prompt.content
    while len(prompt.tokens) > max_tokens:
        content = None if isinstance(content, str | None) else without_oldest_turn(content)
        if content is None:
            return None
        prompt = encode_prompt(content, tokenizer, prompt.columns)
    return prompt


def _check_long(path: str, max_tokens: int, too_long: str, long: list[int], fixed: list[int]) -> None:
    """Raises DataError."""
    what = f"more than {max_tokens} tokens"
    if long and too_long == "error":
        raise DataError(
            f"{len(long)} prompts have {what} ({named_lines(long)})",
            where=path,
            fix="raise prompts.max_tokens, or set prompts.too_long to drop or truncate",
        )
    if fixed:
        raise DataError(
            f"the last turn and the system message alone have {what} ({named_lines(fixed)})",
            where=path,
            fix="raise prompts.max_tokens, or set prompts.too_long to drop",
        )


def _keep_end(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Prompt:
    """Drop tokens from the front, but not the special ones that start a text."""
    start = tuple(split_start(prompt.text, tokenizer)[0])
    end = prompt.tokens[len(prompt.tokens) - (max_tokens - len(start)) :]
    text = str(tokenizer.decode(list(end)))
    return Prompt(text, text, start + end, prompt.columns)


def unlike_rows(prompts: Sequence[Prompt], count: int) -> list[int]:
    """Indices of so many prompts, or all: the shortest, the longest, and some in between."""
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row].tokens))
    count = min(count, len(order))
    return [order[place * (len(order) - 1) // max(count - 1, 1)] for place in range(count)]
