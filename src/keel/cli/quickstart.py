"""Run the full pipeline on a built-in example of customer support, in minutes on two cores and without a network.

keel trains a tiny language model from scratch and samples its responses to customers. Simulated raters rank them, a
reward model learns from the rankings, and the policy learns from the reward model. A score that no stage was trained on
evaluates the result.

example:
  keel quickstart
  keel quickstart --algorithm a2c --seed 1 --output runs/quickstart-a2c
"""

from typing import Any

from keel.cli.help import Verb
from keel.cli.settings import read_command
from keel.config import QuickstartConfig

VERB = Verb("quickstart", QuickstartConfig, str(__doc__))


def run(arguments: list[str]) -> dict[str, Any]:
    """Run the pipeline, and return the content of summary.json."""
    command = read_command(VERB, arguments)
    from keel.quickstart.run import quickstart

    return quickstart(command.settings)
