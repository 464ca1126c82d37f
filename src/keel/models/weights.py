"""Whether the weights of a file are those of the model: none missing, none of another shape, none unread in silence,
and all of them numbers."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from keel.errors import ConfigError
from keel.terminal import tell
from keel.world import World

LANGUAGE_HEADS = ("lm_head", "embed_out", "cls.", "vocab_", "lm_predictions", "mask_predictions", "output_projection")
"""Names that the head of a language model has in its file: no scorer reads it."""
SHOWN = 3  # names in a message


def refuse_other_shapes(report: Mapping[str, Any], name: str) -> None:
    """Raise ConfigError naming the first weight whose shape is not what config.json says."""
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        key, in_file, in_model = mismatched[0]
        more = f" ({len(mismatched)} weights differ)" if len(mismatched) > 1 else ""
        raise ConfigError(
            f"{key} is {list(in_file)} in the file and {list(in_model)} by config.json{more}",
            where=name,
            fix="use the config.json that was saved with these weights; a reward model has one label",
        )


def refuse_missing(missing: Collection[str], unread: Collection[str], name: str) -> None:
    """Raise ConfigError naming weights that the model needs and its file does not hold, and those that it holds."""
    if missing:
        others = f"; the file holds {format_names(unread)} instead" if unread else ""
        raise ConfigError(
            f"weights are missing, such as {format_names(missing)}{others}",
            where=name,
            fix="copy or download the folder again, or name a model with all its weights",
        )


def name_unread(unread: Collection[str], name: str) -> None:
    """Say which weights of a file are no part of the model."""
    if unread and World.from_environment().is_main:
        tell(f"{name}: weights that this model does not have were not read: {format_names(unread)}")


def unread_weights(report: Mapping[str, Any], name: str) -> list[str]:
    """Names of the weights that were not read, and of a value head in a file of its own, as LLaMA-Factory saves it."""
    return sorted({*report["unexpected_keys"], *(path.name for path in Path(name).glob("value_head.*"))})


def format_names(names: Collection[str]) -> str:
    """The first few names, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(ordered[:SHOWN]) + more


def require_numbers(model: nn.Module, name: str) -> None:
    """Raise ConfigError naming the first weight that holds NaN or an infinite value."""
    for key, weight in model.named_parameters():
        if weight.is_floating_point() and weight.numel() and not weight.is_meta:
            extremes = torch.stack(weight.detach().aminmax())  # one pass without a copy; NaN is its own extreme
            if not bool(extremes.isfinite().all()):
                count = int((~weight.detach().isfinite()).sum())
                raise ConfigError(
                    f"{key} holds {count} values that are NaN or infinite",
                    where=name,
                    fix="use an earlier checkpoint, or copy the folder again",
                )
