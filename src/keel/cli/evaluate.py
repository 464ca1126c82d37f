"""Judge a policy on prompts it was not trained on: score, KL, length, entropy, and the win rate against another.

example:
  keel evaluate --policy runs/ppo/policy --against runs/sft/model --prompts.path heldout.jsonl \\
      --rewards '{"model": "runs/reward/model"}'
"""

from typing import Any

from keel.cli.settings import read_command
from keel.config import EvaluateConfig


def run(arguments: list[str]) -> dict[str, Any]:
    """Returns the figures of the table."""
    command = read_command("evaluate", EvaluateConfig, arguments, str(__doc__))
    from keel.train.evaluate import evaluate

    return evaluate(command.settings)
