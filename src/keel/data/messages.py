"""Convert chat messages from the formats of data files to one form.

A message is `{"role": ..., "content": text}`. Other keys (`tool_calls`, `name`, `reasoning_content`, ...) are kept for
the chat template. ShareGPT's `{"from": ..., "value": ...}`, lists of text parts and null contents are converted.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from keel.errors import DataError

Messages = list[dict[str, Any]]
Content = str | Messages
"""Text, or chat messages `{"role": ..., "content": ...}`."""

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
INSTRUCTION_ROLES = ("system", "developer")
"""Roles of messages that begin a conversation, and stay when its oldest turns are dropped."""
LOSS_FLAGS = ("weight", "train", "training", "trainable", "loss", "loss_mask")
"""Keys with which other tools mark whether a message is learned: OpenAI, axolotl, verl, slime, ms-swift."""
SHARE_GPT = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}


def as_messages(value: Sequence[Any]) -> Messages:
    """Convert a list of messages. Raises ValueError with the number of the first invalid message, from 1."""
    if not value:
        raise ValueError("the list has no message")
    return [_message(entry, f"message {number}") for number, entry in enumerate(value, start=1)]


def plain_text(content: Content) -> str:
    """Return the text of a prompt, without the roles."""
    return content if isinstance(content, str) else "\n".join(message["content"] for message in content)


def ends_with_assistant(content: Content) -> bool:
    """Whether the last message is of the assistant, so that the response continues it."""
    return not isinstance(content, str) and content[-1]["role"] == "assistant"


def with_response(prompt: Messages, response: Content) -> Messages:
    """Append a response, text or messages, to a prompt.

    The first message of the response continues a prompt that ends with the assistant's turn.
    """
    added = [{"role": "assistant", "content": response}] if isinstance(response, str) else list(response)
    if ends_with_assistant(prompt) and added[0]["role"] == "assistant":
        joined = prompt[-1] | added[0] | {"content": prompt[-1]["content"] + added[0]["content"]}
        return [*prompt[:-1], joined, *added[1:]]
    return [*prompt, *added]


def as_chat(content: Content, system: str | None = None) -> Messages:
    """Turn a text into a user message, and prepend the system message if the conversation has none."""
    messages: Messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
    if system is None or messages[0]["role"] in INSTRUCTION_ROLES:
        return messages
    return [{"role": "system", "content": system}, *messages]


def without_oldest_turn(messages: Messages) -> Messages | None:
    """Drop the oldest turn: a user message and everything up to the next one. Instructions stay.

    Returns None if there is only one turn.
    """
    start = next((i for i, message in enumerate(messages) if message["role"] not in INSTRUCTION_ROLES), len(messages))
    next_user = next((i for i, message in enumerate(messages) if i > start and message["role"] == "user"), None)
    return None if next_user is None else [*messages[:start], *messages[next_user:]]


def learned_turns(prompt: Messages, completion: Messages) -> list[int]:
    """Return the indices in the completion of the assistant messages to learn.

    These are the messages after a user message (or after the prompt), except those that a key of LOSS_FLAGS excludes.

    Raises DataError if there is none, for two assistant messages in a row, or for an invalid flag.
    """
    learned = []
    has_request = bool(prompt)
    any_excluded = False
    for i, message in enumerate(completion):
        if message["role"] == "assistant":
            if i and completion[i - 1]["role"] == "assistant":
                raise DataError(f"message {len(prompt) + i + 1} follows another assistant message", fix="join the two")
            excluded = _is_excluded(message, len(prompt) + i + 1)
            any_excluded = any_excluded or excluded
            if has_request and not excluded:
                learned.append(i)
        has_request = has_request or message["role"] == "user"
    if not learned and any_excluded:
        raise DataError("every assistant message is marked as not to be learned", fix="remove the row")
    if not learned:
        raise DataError("no assistant message follows a user message, so there is nothing to learn")
    return learned


def _is_excluded(message: Mapping[str, Any], number: int) -> bool:
    """Whether a flag excludes the message from the loss. Raises DataError for a flag other than 0, 1, true, false."""
    flags = {key: message[key] for key in LOSS_FLAGS if key in message}
    for key, flag in flags.items():
        if flag not in (0, 1):
            raise DataError(
                f'"{key}" of message {number} is {flag!r}; it must be 1 or true (learned), or 0 or false (not learned)',
                fix="correct it, or rename the key",
            )
    return not all(flags.values())


def _message(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f'{place} is not {{"role": ..., "content": ...}}')
    if "role" not in value and "from" in value:
        value = {"role": value["from"], "content": value.get("value")} | {
            key: entry for key, entry in value.items() if key not in ("from", "value")
        }
        value["role"] = SHARE_GPT.get(value["role"], value["role"]) if isinstance(value["role"], str) else None
    role = value.get("role")
    if not isinstance(role, str):
        raise ValueError(f'{place} has no "role"')
    if role not in ROLES:
        near = SHARE_GPT.get(role) or next(iter(get_close_matches(role, ROLES, n=1)), None)
        hint = f"did you mean {near!r}?" if near else f"known: {', '.join(ROLES)}"
        raise ValueError(f"{place} has the role {role!r}; {hint}")
    others = {key: entry for key, entry in value.items() if entry is not None}  # Parquet fills missing keys with nulls
    return others | {"role": role, "content": _text(value, f"{place} ({role})")}


def _text(message: dict[str, Any], place: str) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None:
        if message["role"] == "assistant" and any(message.get(key) for key in ("tool_calls", "function_call")):
            return ""
        raise ValueError(f'{place} has no "content"')
    if isinstance(content, list):
        return "".join(_part_text(part, place) for part in content)
    raise ValueError(f'"content" of {place} is not text')


def _part_text(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return str(part["text"])
    kind = part.get("type", "an unknown kind") if isinstance(part, dict) else type(part).__name__
    raise ValueError(f"{place} has a part of type {kind!r}; keel reads text parts only")
