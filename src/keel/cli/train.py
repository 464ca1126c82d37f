"""Train a policy on rewards: sample responses, score them, and update it.

The algorithms are ppo, a2c, reinforce, rloo, grpo, reinforce++ and reinforce++_base.

The scorers are reward models, Python functions or HTTP services: --reward-model and --reward-function name them one by
one; --rewards takes a JSON list with all their settings. The policy is saved in the folder policy of the run folder.

example:
  keel train --output runs/ppo --policy.model runs/sft/model \\
      --prompts.path prompts.jsonl --reward-model runs/reward/model
  keel train run.yaml --algorithm.name a2c --algorithm.kl-coef 0.1
"""

from typing import Any

from keel.cli.help import Verb
from keel.cli.settings import read_command
from keel.cli.tables import print_table, select_metrics
from keel.config import TrainConfig

VERB = Verb("train", TrainConfig, str(__doc__), flags=("resume", "check"))
HEADLINE = (
    "objective/scores",
    "objective/kl",
    "response/length",
    "response/truncated",
    "critic/explained_variance",
    "perf/tokens_per_second",
)


def run(arguments: list[str]) -> dict[str, Any]:
    """Train the policy, and return the metrics of the last step, or with --check those of the self-check."""
    command = read_command(VERB, arguments)
    from keel.training.policy import train_policy

    metrics = train_policy(command.settings, resume=command.resume, check_only=command.check)
    if command.check:
        print_table("self-check passed", {"measured": metrics})
    else:
        note = f"policy: {command.settings.output}/policy"
        print_table("last step", {command.settings.algorithm.name: select_metrics(metrics, HEADLINE)}, note)
    return metrics
