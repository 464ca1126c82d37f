"""Chat messages as files have them, in the one form that everything behind reads.

A message is `{"role": ..., "content": text}`; what else it has (`tool_calls`, `name`, `reasoning_content`, ...) is kept
for the chat template. ShareGPT's `{"from": ..., "value": ...}`, lists of text parts and null contents are converted.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from keel.errors import DataError

Messages = list[dict[str, Any]]
Content = str | Messages
"""A prompt as the file has it: text, or chat messages `{"role": ..., "content": ...}`."""

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
INSTRUCTING = ("system", "developer")
"""Roles whose messages open a conversation and stay when its oldest turns are dropped."""
LOSS_FLAGS = ("weight", "train", "training", "trainable", "loss", "loss_mask")
"""Keys of a message by which other tools say whether it is learned: OpenAI, axolotl, verl, slime, ms-swift."""
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
    """Return the messages of a list. Raises ValueError naming the first that is none, counted from 1."""
    if not value:
        raise ValueError("it holds no message")
    return [_message(entry, f"message {number}") for number, entry in enumerate(value, start=1)]


def plain_text(content: Content) -> str:
    """Return the words of a prompt, whoever says them."""
    return content if isinstance(content, str) else "\n".join(message["content"] for message in content)


def ends_with_assistant(content: Content) -> bool:
    """Whether the response continues the last message."""
    return not isinstance(content, str) and content[-1]["role"] == "assistant"


def with_response(prompt: Messages, response: Content) -> Messages:
    """Return the conversation with its response: text or messages. A prompt that ends with the assistant's turn is
    continued by the first message of the response."""
    answer = [{"role": "assistant", "content": response}] if isinstance(response, str) else list(response)
    if ends_with_assistant(prompt) and answer[0]["role"] == "assistant":
        last = prompt[-1] | answer[0] | {"content": prompt[-1]["content"] + answer[0]["content"]}
        return [*prompt[:-1], last, *answer[1:]]
    return [*prompt, *answer]


def as_chat(content: Content, system: str | None = None) -> Messages:
    """Return a text as the user's message, and a system message before a conversation that has none."""
    messages: Messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
    if system is None or messages[0]["role"] in INSTRUCTING:
        return messages
    return [{"role": "system", "content": system}, *messages]


def without_oldest_turn(messages: Messages) -> Messages | None:
    """Return the conversation without its oldest turn: a user's message and all up to the next.

    The instructions before it stay. None when that turn is the last.
    """
    start = next((i for i, message in enumerate(messages) if message["role"] not in INSTRUCTING), len(messages))
    users = (i for i, message in enumerate(messages) if i > start and message["role"] == "user")
    following = next(users, None)
    return None if following is None else [*messages[:start], *messages[following:]]


def learned_turns(prompt: Messages, completion: Messages) -> list[int]:
    """Places in the completion of the assistant's turns that answer somebody and are not marked as not to be learned.

    Raises DataError when there is none, one that follows the assistant's own, or a mark that is neither yes nor no.
    """
    found = []
    asked = bool(prompt)
    marked = False
    for i, message in enumerate(completion):
        if message["role"] == "assistant":
            if i and completion[i - 1]["role"] == "assistant":
                raise DataError(
                    f"message {len(prompt) + i + 1} follows another one of the assistant", fix="join the two"
                )
            excluded = _is_excluded(message, len(prompt) + i + 1)
            marked = marked or excluded
            if asked and not excluded:
                found.append(i)
        asked = asked or message["role"] == "user"
    if not found and marked:
        raise DataError("every message of the assistant is marked as not to be learned", fix="leave the row out")
    if not found:
        raise DataError("no message of the assistant answers a user's, so there is nothing to learn")
    return found


def _is_excluded(message: Mapping[str, Any], number: int) -> bool:
    """Whether a flag of the message excludes it from the loss. Raises DataError for one that is neither yes nor no."""
    flags = {key: message[key] for key in LOSS_FLAGS if key in message}
    for key, flag in flags.items():
        if flag not in (0, 1):
            what = f'"{key}" of message {number} is {flag!r}; a message is learned (1, true) or not (0, false)'
            raise DataError(what, fix="give one of these, or rename the key")
    return not all(flags.values())


def _message(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f'{place} is no {{"role": ..., "content": ...}}')
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
    others = {key: entry for key, entry in value.items() if entry is not None}  # Parquet fills columns with nulls
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
        return "".join(_part(part, place) for part in content)
    raise ValueError(f'"content" of {place} is no text')


def _part(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return str(part["text"])
    kind = part.get("type", "an unknown kind") if isinstance(part, dict) else type(part).__name__
    raise ValueError(f"{place} holds a part of type {kind!r}; keel reads text parts only")
