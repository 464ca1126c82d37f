"""Load prompts and encode them as the policy reads them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from keel.data.chats import read_tools, render_chat, template_omissions
from keel.data.messages import as_chat, ends_with_assistant, without_oldest_turn
from keel.data.notes import BARE_TEXT, OMISSION, Notes, line_list, note_mixed_kinds, note_omitted_messages, remarks
from keel.data.rows import Content, Row, read_rows, reject, require_content, row_in_errors
from keel.errors import DataError


@dataclass(frozen=True)
class Prompt:
    """A prompt as content, text and tokens, with the other columns of its row."""

    content: Content  # as in the file, or what remains of it within the length limit
    text: str  # what the policy reads: the content, or the chat rendered up to the beginning of the response
    tokens: tuple[int, ...]  # ids of the text; the ids of the response are appended to them
    columns: dict[str, Any]  # the other columns of the row, for reward functions


@dataclass(frozen=True)
class PromptFormat:
    """Column of the prompt, and how to present the prompt to a model."""

    column: str = "prompt"
    chat: bool | None = None  # True turns a text into a user message; None keeps it and adds a remark; False keeps it
    system: str | None = None  # system message of conversations that have none

    def convert_content(self, content: Content) -> Content:
        """Return a prompt in the form for the model. The system message applies only to conversations."""
        return content if isinstance(content, str) and not self.chat else as_chat(content, self.system)

    def convert(self, content: Content, row: Row, path: str, tokenizer: Any, notes: Notes | None) -> Content:
        """Return a prompt in the form for the model, and add remarks on what looks unintended."""
        converted = self.convert_content(content)
        if notes is not None:
            if isinstance(converted, str):
                if self.system is not None:
                    notes.add(path, row.number, "the system message is not used for plain text; set chat to true")
                if self.chat is None and tokenizer.chat_template:
                    notes.add(path, row.number, BARE_TEXT)
            else:
                for remark in remarks(converted, tokenizer):
                    notes.add(path, row.number, remark)
        return converted


UNCHANGED = PromptFormat()


def load_prompts(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: list[Row] | None = None,
    split: str = "train",
    max_tokens: int = 512,
    too_long: str = "error",
    prompt_format: PromptFormat = UNCHANGED,
    notes: Notes | None = None,
) -> list[Prompt]:
    """Load the prompts of a file, or of `rows`.

    Args:
        path: File or hub data set; with `rows`, their name in errors.
        max_tokens: Longest prompt, in tokens.
        too_long: What to do with a longer prompt: error, drop, or truncate. A truncated chat loses its oldest turns,
            never a system message or a part of a message; a text loses its beginning. Scorers read what remains.

    Raises DataError for a bad row, for a prompt that is too long and must not or cannot be shortened, or if no prompt
    remains.
    """
    prompts: list[Prompt] = []
    long, not_shortened = list[int](), list[int]()  # lines; in the second, the last turn alone is too long
    notes = notes if notes is not None else Notes()
    rows = read_rows(path, split) if rows is None else rows
    for row in rows:
        with row_in_errors(row, path):
            prompt = read_prompt(row, path, tokenizer, prompt_format, notes)
            if len(prompt.tokens) > max_tokens:
                long.append(row.number)
                if too_long != "truncate":
                    continue
                shorter = shorten_prompt(prompt, tokenizer, max_tokens)
                if shorter is None:
                    not_shortened.append(row.number)
                    continue
                prompt = shorter
        prompts.append(prompt)
    _check_lengths(path, max_tokens, too_long, long, not_shortened)
    if not prompts:
        raise DataError(f"all prompts have more than {max_tokens} tokens", where=path, fix="raise prompts.max_tokens")
    for number in long:
        action = "dropped" if too_long == "drop" else "shortened"
        notes.add(path, number, f"more than {max_tokens} tokens (prompts.max_tokens); {action}")
    note_mixed_kinds(path, {row.number: row.values[prompt_format.column] for row in rows}, notes)
    return prompts


def read_prompt(
    row: Row,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat = UNCHANGED,
    notes: Notes | None = None,
) -> Prompt:
    """Read the prompt of a row, at its full length. Raises DataError."""
    content = prompt_format.convert(require_content(row, path, prompt_format.column), row, path, tokenizer, notes)
    others = {name: value for name, value in row.values.items() if name != prompt_format.column}
    try:
        read_tools(others)
    except ValueError as error:
        reject(row, path, str(error))
    prompt = encode_prompt(content, tokenizer, others)
    if not prompt.tokens:
        reject(row, path, f'the tokenizer has no tokens for "{prompt_format.column}"; give a prompt that it can encode')
    if notes is not None and not isinstance(content, str):
        note_omitted_messages(content, prompt.text, path, row.number, notes)
        for omission in template_omissions(content, tokenizer, read_tools(others)):
            notes.add(path, row.number, OMISSION + omission)
    return prompt


def encode_prompt(
    content: Content, tokenizer: PreTrainedTokenizerBase, columns: Mapping[str, Any] | None = None
) -> Prompt:
    """Encode a prompt. A text begins with the tokenizer's start tokens; a chat is rendered with the chat template.

    The template also gets the column `tools`. A chat that ends with the assistant's turn is left open at its end.
    """
    columns = dict(columns or {})
    if isinstance(content, str):
        text, tokens = content, encode_text(content, tokenizer)
    else:
        is_continued = ends_with_assistant(content)
        rendered = render_chat(content, tokenizer, not is_continued, tools=read_tools(columns), ended=not is_continued)
        text, tokens = rendered.text, rendered.tokens(tokenizer)
    return Prompt(content, text, tuple(tokens), columns)


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Encode a text that the model continues: with the tokenizer's start tokens, without its end tokens."""
    start, rest = split_start(text, tokenizer)
    return start + rest


def split_start(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before every text, and the ids of the text.

    A text that another tool rendered may already begin with the start token ("<s>"); it is not repeated.
    """
    full, bare = tokenizer.encode(text), tokenizer.encode(text, add_special_tokens=False)
    positions = (i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare)
    start = full[: next(positions, 0)]
    return start, bare[len(start) :] if bare[: len(start)] == start else bare


def shorten_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Prompt | None:
    """Shorten a prompt to at most `max_tokens`; None for a chat whose last turn alone is longer."""
    if isinstance(prompt.content, str):
        return _keep_end(prompt, tokenizer, max_tokens)
    content: Content | None = prompt.content
    while len(prompt.tokens) > max_tokens:
        content = None if isinstance(content, str | None) else without_oldest_turn(content)
        if content is None:
            return None
        prompt = encode_prompt(content, tokenizer, prompt.columns)
    return prompt


def _check_lengths(path: str, max_tokens: int, too_long: str, long: list[int], not_shortened: list[int]) -> None:
    what = f"more than {max_tokens} tokens"
    if long and too_long == "error":
        raise DataError(
            f"{len(long)} prompts have {what} ({line_list(long)})",
            where=path,
            fix="raise prompts.max_tokens, or set prompts.too_long to drop or truncate",
        )
    if not_shortened:
        raise DataError(
            f"the last turn and the system message alone have {what} ({line_list(not_shortened)})",
            where=path,
            fix="raise prompts.max_tokens, or set prompts.too_long to drop",
        )


def _keep_end(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Prompt:
    """Drop tokens from the beginning, but keep the tokenizer's start tokens."""
    start = tuple(split_start(prompt.text, tokenizer)[0])
    end = prompt.tokens[len(prompt.tokens) - (max_tokens - len(start)) :]
    text = str(tokenizer.decode(list(end)))
    return Prompt(text, text, start + end, prompt.columns)


def rows_of_varied_length(prompts: Sequence[Prompt], count: int) -> list[int]:
    """Return the indices of `count` prompts, or of all: the shortest, the longest, and evenly spaced ranks between."""
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row].tokens))
    count = min(count, len(by_length))
    return [by_length[i * (len(by_length) - 1) // max(count - 1, 1)] for i in range(count)]
