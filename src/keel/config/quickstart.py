"""Settings of `keel quickstart`."""

from typing import Literal

from keel.config.base import Count, Settings


class QuickstartConfig(Settings):
    """Settings of `keel quickstart`: run all stages on a built-in example."""

    output: str = "runs/quickstart"
    """Folder for all results"""
    seed: int = 0
    """Random seed of the example data and of every stage"""
    algorithm: Literal["ppo", "a2c"] = "ppo"
    """Algorithm that trains the policy"""
    human: bool = False
    """Rank the responses yourself in a web page, instead of simulated raters"""
    human_rankings: Count = 60
    """With `human`: number of rankings to ask for; you may stop earlier"""
