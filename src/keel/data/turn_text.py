"""The turns of a conversation in words."""

import json
from collections.abc import Mapping
from typing import Any


def turn_text(message: Mapping[str, Any]) -> str:
    """The text of a turn and, as JSON, what it holds beside: parts that are no text, calls of tools."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    texts = [part["text"] if isinstance(part, Mapping) and "text" in part else part for part in parts]
    shown = [text if isinstance(text, str) else json.dumps(text, ensure_ascii=False) for text in texts if text]
    more = {name: value for name, value in message.items() if name not in ("role", "content") and value}
    return "\n".join([*shown, *([json.dumps(more, ensure_ascii=False, indent=1)] if more else [])])


def content_text(content: Any) -> str:
    """Return a prompt as text; a conversation as `role: text` lines."""
    if isinstance(content, str):
        return content
    return "\n".join(f"{message['role']}: {turn_text(message)}" for message in content)
