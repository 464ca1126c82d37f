"""Remarks on rows that are usable but odd. Each remark is printed once, with its rows."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from keel.data.chats import render_chat, spelled_tokens, template_omissions
from keel.data.messages import Content, Messages, with_response

LISTED_LINES = 5
"""Lines that a remark lists; all are counted."""
BARE_TEXT = "a chat model gets plain text without its chat template; set chat to true, or to false if this is intended"
LOST_RESPONSE = "the chat template omits a part of a response"
OMISSION = "the chat template omits "


@dataclass
class Notes:
    """Remarks on the rows of data files."""

    bare: bool = True  # whether to remark on plain text for a chat model
    rows: dict[tuple[str, str], set[int]] = field(default_factory=dict)  # (file, remark) -> lines

    def add(self, path: str, line: int, remark: str) -> None:
        """Add a remark on a row. The same remark on the same row counts once."""
        self.rows.setdefault((path, remark), set()).add(line)

    def add_for_place(self, place: str, remark: str) -> None:
        """Add a remark on the row at a place `FILE:LINE`; an empty place is ignored."""
        path, _, line = place.rpartition(":")
        if path:
            self.add(path, int(line), remark)

    def lines(self) -> list[str]:
        """Return one line for each remark: file, number of rows, the first lines, the remark."""
        return [
            f"{path}: {len(lines):,} row{'' if len(lines) == 1 else 's'} ({line_list(sorted(lines))}): {remark}"
            for (path, remark), lines in self.rows.items()
        ]


def line_list(lines: Sequence[int]) -> str:
    """Return the first lines as text: `line 3`, or `lines 2, 5, 9, 11, 12, ...`."""
    listed = ", ".join(map(str, lines[:LISTED_LINES])) + (", ..." if len(lines) > LISTED_LINES else "")
    return f"line{'' if len(lines) == 1 else 's'} {listed}"


def remarks(messages: Messages, tokenizer: Any = None, first: int = 1) -> Iterator[str]:
    """Yield remarks on a readable conversation. `first` is the number of its first message."""
    for number, message in enumerate(messages, start=first):
        if not message["content"].strip() and message["role"] != "assistant":
            yield f"message {number} ({message['role']}) is empty"
    if tokenizer is not None and (spelled := spelled_tokens(messages, tokenizer)):
        yield f"a message spells the control token {spelled[0]!r}, which is read as plain text"


def note_mixed_kinds(path: str, prompts: Mapping[int, Any], notes: Notes) -> None:
    """Remark on the less frequent kind of prompts in a file of texts and chats. `prompts` maps lines to prompts."""
    chats = [line for line, prompt in prompts.items() if not isinstance(prompt, str)]
    texts = [line for line, prompt in prompts.items() if isinstance(prompt, str)]
    if chats and texts:
        lines, remark = (
            (chats, "a chat, while most rows are texts")
            if len(chats) <= len(texts)
            else (texts, "a text, while most rows are chats")
        )
        for line in lines:
            notes.add(path, line, remark)


def note_omitted_messages(messages: Messages, text: str, path: str, line: int, notes: Notes) -> None:
    """Remark on each message that is missing in the rendered text; assistant messages are not checked."""
    written = "".join(text.split())
    for number, message in enumerate(messages, start=1):
        content = message["content"]
        forms = (
            content,
            json.dumps(content, ensure_ascii=False)[1:-1],
        )  # Llama 3.1 writes the result of a tool as JSON
        if message["role"] != "assistant" and not any("".join(form.split()) in written for form in forms):
            notes.add(path, line, f"{OMISSION}message {number} ({message['role']})")


def loses_response(messages: Messages, tokenizer: Any, tools: Sequence[Any] | None) -> bool:
    """Whether the template changes the text of the last assistant message, for example by omitting thoughts."""
    last = next((i for i in range(len(messages) - 1, -1, -1) if messages[i]["role"] == "assistant"), None)
    if last is None:
        return False
    text = render_chat(messages[: last + 1], tokenizer, tools=tools).text
    return "".join(messages[last]["content"].split()) not in "".join(text.split())


def note_comparison(
    prompt: Content, responses: Sequence[str], tools: Sequence[Any] | None, place: str, tokenizer: Any, notes: Notes
) -> None:
    """Add remarks on a prompt and its responses as a model with this tokenizer reads them."""
    if isinstance(prompt, str):
        if notes.bare and tokenizer.chat_template:
            notes.add_for_place(place, BARE_TEXT)
        return
    for response in responses:
        messages = with_response(prompt, response)
        for remark in remarks(messages, tokenizer):
            notes.add_for_place(place, remark)
        if loses_response(messages, tokenizer, tools):
            notes.add_for_place(place, LOST_RESPONSE)
        for omission in template_omissions(messages, tokenizer, tools):
            notes.add_for_place(place, OMISSION + omission)
