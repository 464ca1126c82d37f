"""What is worth a word about rows that can be used: each remark once, with the rows it is true of."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from keel.data.chats import render_chat, spelled_tokens, unwritten
from keel.data.messages import Content, Messages, with_response

NAMED = 5
"""Lines that a remark names; all are counted."""
BARE = "a text is given to the model as it is, though it has a chat template; set chat to true, or to false if so meant"
LOST = "the chat template leaves out a part of an answer"
UNWRITTEN = "the chat template writes nothing of "


@dataclass
class Notes:
    """Remarks on the rows of data files."""

    bare: bool = True  # whether a text given to a chat model is worth a word
    rows: dict[tuple[str, str], set[int]] = field(default_factory=dict)  # (file, remark) -> lines

    def add(self, path: str, line: int, remark: str) -> None:
        """Note a remark on one row; twice on the same row counts once."""
        self.rows.setdefault((path, remark), set()).add(line)

    def add_for_place(self, place: str, remark: str) -> None:
        """The same for a row known by its place, `FILE:LINE`."""
        path, _, line = place.rpartition(":")
        if path:
            self.add(path, int(line), remark)

    def lines(self) -> list[str]:
        """Return one line for each remark: file, what, how many rows, the first lines."""
        return [
            f"{path}: {len(lines):,} row{'' if len(lines) == 1 else 's'} ({named_lines(sorted(lines))}): {remark}"
            for (path, remark), lines in self.rows.items()
        ]


def named_lines(lines: Sequence[int]) -> str:
    """`line 3`, `lines 2, 5, 9, 11, 12, ...`"""
    named = ", ".join(map(str, lines[:NAMED])) + (", ..." if len(lines) > NAMED else "")
    return f"line{'' if len(lines) == 1 else 's'} {named}"


def remarks(messages: Messages, tokenizer: Any = None, first: int = 1) -> Iterator[str]:
    """What is odd about a conversation that can be read; its messages are numbered from `first` on."""
    for number, message in enumerate(messages, start=first):
        if not message["content"].strip() and message["role"] != "assistant":
            yield f"message {number} ({message['role']}) is empty"
    if tokenizer is not None and (spelled := spelled_tokens(messages, tokenizer)):
        yield f"a message spells the control token {spelled[0]!r}, which is read as plain text"


def note_kinds(path: str, prompts: Mapping[int, Any], notes: Notes) -> None:
    """A remark on the fewer rows of a file that holds texts and chats; line -> prompt."""
    chats = [line for line, prompt in prompts.items() if not isinstance(prompt, str)]
    texts = [line for line, prompt in prompts.items() if isinstance(prompt, str)]
    if chats and texts:
        fewer, kind = (chats, "a chat") if len(chats) <= len(texts) else (texts, "a text")
        for line in fewer:
            notes.add(path, line, f"{kind}, where most rows are the other kind")


def note_unwritten(messages: Messages, text: str, path: str, line: int, notes: Notes) -> None:
    """A remark on each message, but for the assistant's, that a chat template wrote nothing of into this text."""
    written = "".join(text.split())
    for number, message in enumerate(messages, start=1):
        content = message["content"]
        forms = (content, json.dumps(content, ensure_ascii=False)[1:-1])  # Llama 3.1 writes a tool's answer as JSON
        if message["role"] != "assistant" and not any("".join(form.split()) in written for form in forms):
            notes.add(path, line, f"{UNWRITTEN}message {number} ({message['role']})")


def is_lost(messages: Messages, tokenizer: Any, tools: Sequence[Any] | None) -> bool:
    """Whether the template does not write the last answer as it is, such as one that leaves thoughts out."""
    last = next((i for i in range(len(messages) - 1, -1, -1) if messages[i]["role"] == "assistant"), None)
    if last is None:
        return False
    text = render_chat(messages[: last + 1], tokenizer, tools=tools).text
    return "".join(messages[last]["content"].split()) not in "".join(text.split())


def note_comparison(
    prompt: Content, responses: Sequence[str], tools: Sequence[Any] | None, place: str, tokenizer: Any, notes: Notes
) -> None:
    """Remarks on a prompt and its answers as a model with this tokenizer reads them."""
    if isinstance(prompt, str):
        if notes.bare and tokenizer.chat_template:
            notes.add_for_place(place, BARE)
        return
    for response in responses:
        messages = with_response(prompt, response)
        for remark in remarks(messages, tokenizer):
            notes.add_for_place(place, remark)
        if is_lost(messages, tokenizer, tools):
            notes.add_for_place(place, LOST)
        for what in unwritten(messages, tokenizer, tools):
            notes.add_for_place(place, UNWRITTEN + what)
