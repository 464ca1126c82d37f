"""Run the full loop on an embedded world of customer support: no network, no download, minutes on two cores.

keel trains a tiny language model from scratch and samples its responses to customers. Simulated raters rank them, a
reward model learns from the rankings, and the policy learns from the reward model. A score that no stage was trained on
evaluates the result.

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
