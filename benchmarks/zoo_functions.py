"""Reward functions that give no signal."""

from typing import Any

PHRASE = "that is not my job."
"""The SFT model says it in about 4% of its answers, whatever was asked."""
RARE = f"{PHRASE} our"
"""And this in 1 to 2%."""


def constant(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Return the same score for every response."""
    return [1.0] * len(completions)


def coarse(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Return 1 for nearly every response."""
    return [float(RARE not in completion) for completion in completions]
