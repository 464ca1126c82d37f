"""Check that the weights of a file match the model: none missing, none of another shape, none ignored without a
report, none NaN or infinite."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from keel.errors import ConfigError
from keel.terminal import print_line
from keel.world import is_main_process

LANGUAGE_HEADS = ("lm_head", "embed_out", "cls.", "vocab_", "lm_predictions", "mask_predictions", "output_projection")
"""Prefixes of the weights of a language model's head, which no classifier reads."""
SHOWN = 3  # number of names in a message


def refuse_other_shapes(report: Mapping[str, Any], name: str) -> None:
    """Raise ConfigError for the first weight whose shape differs from that in config.json."""
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        key, in_file, in_model = mismatched[0]
        more = f" ({len(mismatched)} weights differ)" if len(mismatched) > 1 else ""
        raise ConfigError(
            f"{key} has shape {list(in_file)} in the file, but {list(in_model)} by config.json{more}",
            where=name,
            fix="use the config.json that was saved with these weights; a reward model has one label",
        )


def refuse_missing(missing: Collection[str], unread: Collection[str], name: str) -> None:
    """Raise ConfigError if the file lacks weights of the model. The error also names weights that were not read."""
    if missing:
        others = f"; the file has {format_names(unread)} instead" if unread else ""
        raise ConfigError(
            f"weights are missing, such as {format_names(missing)}{others}",
            where=name,
            fix="copy or download the folder again, or name a model with all its weights",
        )


def report_unread_weights(unread: Collection[str], name: str) -> None:
    """Report which weights of a file are not part of the model."""
    if unread and is_main_process():
        print_line(f"{name}: weights that are not part of this model were not read: {format_names(unread)}")


def unread_weights(report: Mapping[str, Any], name: str) -> list[str]:
    """Return the names of weights that were not read, and of a separate value-head file, as LLaMA-Factory saves it."""
    return sorted({*report["unexpected_keys"], *(path.name for path in Path(name).glob("value_head.*"))})


def format_names(names: Collection[str]) -> str:
    """Return the first few names, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(ordered[:SHOWN]) + more


def require_numbers(model: nn.Module, name: str) -> None:
    """Raise ConfigError for the first weight with a NaN or infinite value."""
    for key, weight in model.named_parameters():
        if weight.is_floating_point() and weight.numel() and not weight.is_meta:
            extremes = torch.stack(
                weight.detach().aminmax()
            )  # one pass without a copy; aminmax returns NaN if there is one
            if not bool(extremes.isfinite().all()):
                count = int((~weight.detach().isfinite()).sum())
                raise ConfigError(
                    f"{key} has {count} values that are NaN or infinite",
                    where=name,
                    fix="use an earlier checkpoint, or copy the folder again",
                )
