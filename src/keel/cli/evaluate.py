"""Evaluate policies on held-out prompts: score, KL, length, entropy, and the win rate against another policy.

Several policies are shown in one table, each under the shortest name that identifies its folder. Every metric has a 95%
confidence interval over prompts. If a gate is not met, the exit code is 1. docs/evaluation.md explains each metric.

example:
  keel evaluate --policy runs/ppo/policy --against runs/sft/model \\
      --prompts.path heldout.jsonl --reward-model runs/reward/model
  keel evaluate release.yaml --gate "low(win_rate)>=0.5, kl<=20"
  keel evaluate --checkpoints runs/ppo --prompts.path heldout.jsonl
"""

from typing import Any

from keel.cli.help import Verb
from keel.cli.settings import read_command
from keel.config import EvaluateConfig
from keel.errors import GateFailed

VERB = Verb("evaluate", EvaluateConfig, str(__doc__))


def run(arguments: list[str]) -> dict[str, Any]:
    """Print and return all metrics. Raises GateFailed."""
    command = read_command(VERB, arguments)
    from keel.cli.evaluation import print_evaluation
    from keel.evaluation.evaluate import evaluate_policies

    settings = command.settings
    metrics = evaluate_policies(settings)
    print_evaluation(metrics)
    if settings.output:
        print(f"metrics and responses: {settings.output}")
    if not metrics.get("gate", {}).get("passed", True):
        error = GateFailed(f"the gate is not met: {'; '.join(metrics['gate']['failed'])}", where=settings.policy[0])
        error.metrics = metrics
        raise error
    return metrics
