"""Conversations as text for people."""

import json
from collections.abc import Mapping
from typing import Any


def turn_text(message: Mapping[str, Any]) -> str:
    """Return the text of a turn, followed by its other values (other parts, tool calls) as JSON."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    texts = [part["text"] if isinstance(part, Mapping) and "text" in part else part for part in parts]
    lines = [text if isinstance(text, str) else json.dumps(text, ensure_ascii=False) for text in texts if text]
    more = {name: value for name, value in message.items() if name not in ("role", "content") and value}
    return "\n".join([*lines, *([json.dumps(more, ensure_ascii=False, indent=1)] if more else [])])


def content_text(content: Any) -> str:
    """Return a prompt as text, a conversation as lines `role: text`."""
    if isinstance(content, str):
        return content
    return "\n".join(f"{message['role']}: {turn_text(message)}" for message in content)
