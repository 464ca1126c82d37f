"""Prompts handed over in Python, read as those of a file are."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from keel.config import PromptSettings
from keel.data.prompts import Prompt
from keel.data.python_rows import given_in_python, rows_from_python
from keel.models.prompt_reading import read_prompts

GIVEN = given_in_python("prompts")
"""Stands where settings and errors name the file."""


def with_place(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run whose prompts are given: `prompts.path` may be missing."""
    section = config.get("prompts") or {}
    return {**config, "prompts": {"path": GIVEN, **section} if isinstance(section, Mapping) else section}


def load_training_prompts(settings: PromptSettings, tokenizer: PreTrainedTokenizerBase, prompts: Any) -> list[Prompt]:
    """The prompts given in Python; those of the settings' file where there are none (None)."""
    if prompts is None:
        return read_prompts(settings, tokenizer)
    if isinstance(prompts, list) and prompts and all(isinstance(prompt, Prompt) for prompt in prompts):
        return list(prompts)
    return read_prompts(
        settings, tokenizer, GIVEN, rows=rows_from_python(prompts, "prompts", settings.column, settings.column)
    )


def prompt_fingerprint(prompts: Sequence[Prompt]) -> str:
    """The SHA-256 of their contents and columns."""
    rows = [[prompt.content, prompt.columns] for prompt in prompts]
    return hashlib.sha256(json.dumps(rows, default=repr).encode()).hexdigest()
