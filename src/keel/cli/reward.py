"""Train a reward model on human judgement: pairs (prompt, chosen, rejected) or rankings (prompt, responses, ranks).

example:
  keel reward --output runs/reward --model distilgpt2 --data.path rankings.jsonl --loss listwise
"""

from typing import Any

from keel.cli.settings import read_command
from keel.config import RewardConfig


def run(arguments: list[str]) -> dict[str, Any]:
    """Returns the figures on the held-out prompts."""
    command = read_command("reward", RewardConfig, arguments, str(__doc__), flags=("resume",))
    from keel.train.reward import reward

    figures = reward(command.settings, resume=command.resume)  # prints its figures beside those of the baselines
    print(f"the reward model: {command.settings.output}/model")
    return figures
