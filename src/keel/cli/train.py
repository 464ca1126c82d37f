"""Teach a policy by rewards: sample answers, score them, improve (ppo, a2c, reinforce, rloo, grpo).

example:
  keel train run.yaml --algorithm.name a2c --algorithm.kl-coef 0.1
  keel train --output runs/ppo --policy.model runs/sft/model --prompts.path prompts.jsonl \\
      --rewards '{"model": "runs/reward/model"}'
"""

from typing import Any

from keel.cli.settings import read_command
from keel.config import TrainConfig


def run(arguments: list[str]) -> dict[str, Any]:
    """Returns the figures of the last step."""
    command = read_command("train", TrainConfig, arguments, str(__doc__), flags=("resume", "check"))
    from keel.train.policy import train_policy

    return train_policy(command.settings, resume=command.resume, check_only=command.check)
