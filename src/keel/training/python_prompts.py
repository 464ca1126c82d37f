"""Prompts that are passed in Python instead of in a file."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from keel.config import PromptSettings, TrainPrompts
from keel.data.prompts import Prompt
from keel.data.python_rows import rows_from_python, source_name
from keel.errors import ConfigError
from keel.models.prompt_reading import read_prompts, read_training_prompts
from keel.training.prompt_order import Mixture

PYTHON_PROMPTS = source_name("prompts")
"""The name of such prompts in settings and errors, in place of the file."""


def with_place(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in `prompts.path`, which may be missing from the settings of a run with prompts in Python."""
    section = config.get("prompts") or {}
    return {**config, "prompts": {"path": PYTHON_PROMPTS, **section} if isinstance(section, Mapping) else section}


def load_training_prompts(
    settings: TrainPrompts, tokenizer: PreTrainedTokenizerBase, prompts: Any
) -> tuple[list[Prompt], Mixture | None]:
    """Read the prompts passed in Python, or with None those of the settings' files, and how the files are mixed.

    Raises ConfigError for prompts passed in Python beside `prompts.others`.
    """
    if prompts is not None and (settings.others or settings.weight):
        raise ConfigError("prompts are passed in Python, so no file is mixed", "prompts.others", "remove it")
    if isinstance(prompts, list) and prompts and all(isinstance(prompt, Prompt) for prompt in prompts):
        return list(prompts), None
    given = None if prompts is None else rows_from_python(prompts, "prompts", settings.column, settings.column)
    files = read_training_prompts(settings, tokenizer, given, PYTHON_PROMPTS)
    weights = tuple(file.weight for file in settings.files if file.weight)
    mixture = Mixture(tuple(map(len, files)), weights) if len(files) > 1 and weights else None
    return [prompt for file in files for prompt in file], mixture


def read_given_prompts(settings: PromptSettings, tokenizer: PreTrainedTokenizerBase, prompts: Any) -> list[Prompt]:
    """Read the prompts that the caller of a step passes, as they are."""
    if isinstance(prompts, list) and prompts and all(isinstance(prompt, Prompt) for prompt in prompts):
        return list(prompts)
    rows = rows_from_python(prompts, "prompts", settings.column, settings.column)
    return read_prompts(settings, tokenizer, PYTHON_PROMPTS, rows=rows)


def prompt_fingerprint(prompts: Sequence[Prompt]) -> str:
    """Return the SHA-256 of the contents and columns of the prompts."""
    rows = [[prompt.content, prompt.columns] for prompt in prompts]
    return hashlib.sha256(json.dumps(rows, default=repr).encode()).hexdigest()
