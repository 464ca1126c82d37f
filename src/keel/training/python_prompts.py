"""Prompts that are passed in Python instead of in a file."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from keel.config import PromptSettings
from keel.data.prompts import Prompt
from keel.data.python_rows import rows_from_python, source_name
from keel.models.prompt_reading import read_prompts

PYTHON_PROMPTS = source_name("prompts")
"""The name of such prompts in settings and errors, in place of the file."""


def with_place(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in `prompts.path`, which may be missing from the settings of a run with prompts in Python."""
    section = config.get("prompts") or {}
    return {**config, "prompts": {"path": PYTHON_PROMPTS, **section} if isinstance(section, Mapping) else section}


def load_training_prompts(settings: PromptSettings, tokenizer: PreTrainedTokenizerBase, prompts: Any) -> list[Prompt]:
    """Read the prompts passed in Python, or with None those of the settings' file."""
    if prompts is None:
        return read_prompts(settings, tokenizer)
    if isinstance(prompts, list) and prompts and all(isinstance(prompt, Prompt) for prompt in prompts):
        return list(prompts)
    return read_prompts(
        settings, tokenizer, PYTHON_PROMPTS, rows=rows_from_python(prompts, "prompts", settings.column, settings.column)
    )


def prompt_fingerprint(prompts: Sequence[Prompt]) -> str:
    """Return the SHA-256 of the contents and columns of the prompts."""
    rows = [[prompt.content, prompt.columns] for prompt in prompts]
    return hashlib.sha256(json.dumps(rows, default=repr).encode()).hexdigest()
