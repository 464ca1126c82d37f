"""Load the tokenizer with its chat template, and the prompts, according to the settings."""

import os
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

from keel.config import ChatSettings, PromptSettings, TrainPrompts
from keel.data.chat_template import DATE_CALL, cached_template, today
from keel.data.difficulty import filter_by_score, mean_scores
from keel.data.named_templates import set_chat_template
from keel.data.notes import Notes
from keel.data.prompts import Prompt, PromptFormat, load_prompts
from keel.data.rows import Row
from keel.models.loading import load_tokenizer, stop_at_turns
from keel.terminal import print_line
from keel.world import is_main_process


def chat_tokenizer(name: str, settings: ChatSettings) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, with the chat template of the settings. Raises ConfigError."""
    tokenizer = load_tokenizer(name)
    set_chat_template(tokenizer, settings.chat_template, settings.template)
    _report_date(tokenizer)
    return tokenizer


def _report_date(tokenizer: PreTrainedTokenizerBase) -> None:
    """Report that the chat template writes the date, so that prompts change daily, unless SOURCE_DATE_EPOCH is set."""
    source = str(tokenizer.chat_template)
    if (
        DATE_CALL.search(source)
        and "SOURCE_DATE_EPOCH" not in os.environ
        and cached_template(tokenizer, source).writes_date()
    ):
        line = f"the chat template of {tokenizer.name_or_path} writes the date, {today():%Y-%m-%d}"
        print_remarks([f"{line}; to write this date on other days, set SOURCE_DATE_EPOCH={int(today().timestamp())}"])


def end_responses_at_turns(model: Any, tokenizer: PreTrainedTokenizerBase, settings: ChatSettings) -> None:
    """Add the token that ends a turn to the end tokens of the model, if the settings have a chat template."""
    if settings.chat_template is not None:
        stop_at_turns(model, tokenizer)


def read_prompt_format(settings: ChatSettings) -> PromptFormat:
    """Return the format of prompts according to the settings."""
    return PromptFormat(getattr(settings, "column", "prompt"), settings.chat, settings.system)


def read_prompts(
    settings: PromptSettings,
    tokenizer: PreTrainedTokenizerBase,
    path: str | None = None,
    quiet: bool = False,
    rows: list[Row] | None = None,
) -> list[Prompt]:
    """Load prompts, and print a line for each remark on them. Raises DataError.

    Args:
        path: file to read instead of the one in the settings.
        rows: rows to read instead of a file. `path` is then their name in errors.
    """
    notes = Notes()
    prompts = load_prompts(
        path or settings.path,
        tokenizer,
        split=settings.split,
        max_tokens=settings.max_tokens,
        too_long=settings.too_long,
        prompt_format=read_prompt_format(settings),
        notes=notes,
        rows=rows,
    )
    if not quiet:
        print_remarks(notes.lines())
    return prompts


def read_training_prompts(
    settings: TrainPrompts,
    tokenizer: PreTrainedTokenizerBase,
    given: list[Row] | None = None,
    name: str = "",
    quiet: bool = False,
) -> list[list[Prompt]]:
    """Load the prompts of each file of a run, without those that `difficulty` leaves out.

    Args:
        given: rows to read instead of the files, as one file. `name` is then their name in errors.

    Raises DataError.
    """
    if given is not None:
        files = [read_prompts(settings, tokenizer, name, quiet, given)]
    else:
        files = [
            read_prompts(settings.model_copy(update={"path": file.path, "split": file.split}), tokenizer, quiet=quiet)
            for file in settings.files
        ]
    difficulty = settings.difficulty
    if difficulty is None:
        return files
    scores, kept = mean_scores(difficulty.path), list[list[Prompt]]()
    for prompts in files:
        chosen, below, above = filter_by_score(
            prompts, scores, difficulty.min_score, difficulty.max_score, difficulty.path
        )
        kept.append(chosen)
        if not quiet:
            what = f"{len(chosen)} of {len(prompts)} prompts are used: {below} score too low, {above} too high"
            print_remarks([f"{difficulty.path}: {what} (prompts.difficulty)"])
    return kept


def print_remarks(lines: Iterable[str]) -> None:
    """Print remarks in the main process only."""
    if is_main_process():
        for line in lines:
            print_line(line)
