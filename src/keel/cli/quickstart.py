"""Run the whole loop on an embedded world of customer support: no network, no download, minutes on two cores.

A tiny language model is trained from nothing, answers customers, simulated raters rank its answers, a reward model
learns from the rankings, and the policy learns from the reward model. A score that no stage ever saw judges the result.

example:
  keel quickstart
  keel quickstart --algorithm a2c --seed 1 --output runs/quickstart-a2c
"""

from typing import Any

from keel.cli.settings import read_command
from keel.config import QuickstartConfig


def run(arguments: list[str]) -> dict[str, Any]:
    """Returns what summary.json holds."""
    command = read_command("quickstart", QuickstartConfig, arguments, str(__doc__))
    from keel.quickstart.run import quickstart

    return quickstart(command.settings)
