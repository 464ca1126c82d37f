"""Set the chat template of a tokenizer by name or from a file, and its variables.

The template and the variables become part of the tokenizer, so they are saved with the model.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keel.errors import ConfigError

CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"""

# Encoders begin a text with their class token and end it with a separator; in a chat only the template can write them.
DIALOGUE = """\
{%- if cls_token is defined and cls_token -%}{{ cls_token }}
{%- elif bos_token is defined and bos_token -%}{{ bos_token }}{%- endif -%}
{%- for message in messages -%}
{{ message['role'] | capitalize + ': ' + message['content'] | trim }}
{%- if message['role'] == 'assistant' and eos_token is defined and eos_token -%}{{ eos_token }}{%- endif -%}
{%- if not loop.last or add_generation_prompt -%}{{ '\\n\\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}
{%- elif sep_token is defined and sep_token -%}{{ sep_token }}{%- endif -%}"""

NAMED = {"chatml": CHATML, "llama3": LLAMA3, "dialogue": DIALOGUE}
NEEDED = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
"""Tokens that a template writes. A vocabulary without them would encode them as ordinary text."""

RESERVED_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt")
"""Variables that a template gets with each conversation, so that settings cannot set them."""


def set_chat_template(tokenizer: Any, source: str | None, settings: Mapping[str, Any] | None = None) -> None:
    """Set the chat template of a tokenizer, and defaults for its variables.

    Args:
        source: A name of `NAMED` or a file; None keeps the tokenizer's template.
        settings: Variables of the template and their values, such as `enable_thinking: false`.

    Raises ConfigError if the template cannot be read, lacks a variable, or writes a token that the vocabulary lacks.
    """
    if source is not None:
        tokenizer.chat_template = _template(source, tokenizer)
    if settings:
        reserved = [name for name in settings if name in RESERVED_VARIABLES or name in tokenizer.special_tokens_map]
        if reserved:
            raise ConfigError(f"{reserved[0]!r} is set by keel for each conversation", "template", "remove it")
        template = tokenizer.chat_template
        if not template:
            raise ConfigError(
                "the tokenizer has no chat template that could use these variables",
                "template",
                "set chat_template as well",
            )
        tokenizer.chat_template = (
            {name: with_settings(text, settings) for name, text in template.items()}
            if isinstance(template, dict)
            else with_settings(template, settings)
        )


def with_settings(template: str, settings: Mapping[str, Any]) -> str:
    """Return the template with defaults for variables that its caller does not set."""
    lines = [
        f"{{%- if {name} is not defined -%}}{{%- set {name} = {_literal(value)} -%}}{{%- endif %}}"
        for name, value in settings.items()
    ]
    unused = [name for name in settings if name not in template]
    if unused:
        raise ConfigError(
            f"the chat template has no variable {unused[0]!r}", "template", "correct the name, or remove it"
        )
    return "".join(lines) + ("\n" if template.startswith("\n") else "") + template


def _literal(value: Any) -> str:
    """Return a value as a Jinja literal."""
    return "none" if value is None else json.dumps(value)


def _template(source: str, tokenizer: Any) -> str:
    if source in NAMED:
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in NEEDED.get(source, ()) if token not in vocabulary]
        if missing:
            raise ConfigError(
                f"the vocabulary has no token {missing[0]}, which the chat template {source} writes",
                where=tokenizer.name_or_path,
                fix="set chat_template to dialogue, which needs only the model's end token",
            )
        return NAMED[source]
    path = Path(source)
    if not path.is_file():
        raise ConfigError(
            f"{source!r} is neither a file nor one of {', '.join(NAMED)}",
            where="chat_template",
            fix="give one of these",
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the chat template: {error}", where=source, fix="give chatml, llama3, dialogue or a text file"
        ) from error
