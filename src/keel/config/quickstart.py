"""Settings of `keel quickstart`."""

from typing import Literal

from keel.config.sections import Count, Settings


class QuickstartConfig(Settings):
    """Settings of `keel quickstart`: the whole loop on an embedded world."""

    output: str = "runs/quickstart"
    """the folder for everything it makes"""
    seed: int = 0
    """of the world and of every random stream"""
    algorithm: Literal["ppo", "a2c"] = "ppo"
    """how the policy learns"""
    human: bool = False
    """you rank the answers in a web page, instead of the simulated raters"""
    human_rankings: Count = 60
    """with human: how many are asked for; fewer will do"""
