"""The flags --reward-model PATH and --reward-function FILE.py:NAME, which add to `rewards` without JSON in a shell."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from keel.errors import ConfigError

SCORERS = "short_scorers"
"""Where argparse collects the scorers of both flags, in the order of the command line."""


@dataclass(frozen=True)
class ShortForm:
    flag: str
    metavar: str
    help: str
    read: Callable[[str], dict[str, Any]]


def read_reward_model(text: str) -> dict[str, Any]:
    """Return the entry of `rewards` for a value of `--reward-model`. Raises ArgumentTypeError."""
    if text.lstrip().startswith(("{", "[")):
        raise argparse.ArgumentTypeError("expected a folder or hub id; give JSON with --rewards")
    if ".py:" in text:
        raise argparse.ArgumentTypeError(f"expected a folder or hub id, got {text!r}; use --reward-function")
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a folder or hub id, got nothing")
    return {"model": text}


def read_reward_function(text: str) -> dict[str, Any]:
    """Return the entry of `rewards` for a value of `--reward-function`. Raises ArgumentTypeError."""
    if text.lstrip().startswith(("{", "[")):
        raise argparse.ArgumentTypeError("expected FILE.py:NAME; give JSON with --rewards")
    file, _, name = text.rpartition(":")
    if not file or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"expected FILE.py:NAME, got {text!r}")
    return {"function": text}


SHORT_FORMS = (
    ShortForm(
        "reward-model", "PATH", "Add a reward model (folder or hub id) to `rewards`; repeatable", read_reward_model
    ),
    ShortForm(
        "reward-function", "FILE.py:NAME", "Add a Python function to `rewards`; repeatable", read_reward_function
    ),
)


def has_short_forms(settings: type[BaseModel]) -> bool:
    """Return whether a verb with these settings takes scorers."""
    return "rewards" in settings.model_fields


def add_short_forms(parser: argparse.ArgumentParser) -> None:
    """Add the flags to a parser. It collects their scorers in one list."""
    for form in SHORT_FORMS:
        parser.add_argument(f"--{form.flag}", dest=SCORERS, action="append", type=form.read)


def append_scorers(data: Mapping[str, Any], scorers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the settings with scorers added to `rewards`. Raises ConfigError for a scorer that `rewards` has."""
    rewards = data.get("rewards")
    if not scorers or not isinstance(rewards, list | None):  # `parse` refuses a value that is not a list
        return dict(data)
    rewards = list(rewards or [])
    for scorer in scorers:
        (kind, place), *_ = scorer.items()
        if any(isinstance(other, Mapping) and other.get(kind) == place for other in rewards):
            # The same scorer twice would count twice in the sum. No user means that by a flag.
            raise ConfigError(
                f"rewards: the {kind} {place} is given twice",
                where="command line",
                fix=f"leave out --reward-{kind}, or give all scorers with --rewards",
            )
        rewards.append(dict(scorer))
    return {**data, "rewards": rewards}
