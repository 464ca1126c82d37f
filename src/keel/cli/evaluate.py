"""Judge policies on prompts they were not trained on: score, KL, length, entropy, and the win rate against another.

Several policies stand in one table, each under the shortest name that tells its folder from the others.

example:
  keel evaluate --policy runs/ppo/policy --policy runs/dpo/policy --against runs/sft/model \\
      --prompts.path heldout.jsonl --rewards '{"model": "runs/reward/model"}'
"""

from collections.abc import Mapping
from typing import Any

from keel.cli.settings import read_command
from keel.cli.tables import show
from keel.config import EvaluateConfig

COMPARED = ("win_rate", "score_difference")


def run(arguments: list[str]) -> dict[str, Any]:
    """Returns the figures of the table."""
    command = read_command("evaluate", EvaluateConfig, arguments, str(__doc__))
    from keel.train.evaluate import evaluate

    figures = evaluate(command.settings)
    policies = figures.get("policies") or {"policy": figures["policy"] | compared(figures)}
    sides = policies | ({"against": figures["against"]} if "against" in figures else {})
    show(
        f"{figures['prompts']} prompts, {figures['responses_per_prompt']} answers to each",
        {side: column(found) for side, found in sides.items()},
    )
    if any("win_rate" in found for found in policies.values()):
        print("win rate and score difference: against the last column, 95% intervals over prompts, a tie is half a win")
    if command.settings.output:
        print(f"figures and answers: {command.settings.output}")
    return figures


def compared(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a comparison."""
    return {name: value for name, value in figures.items() if name == "ties" or name.startswith(COMPARED)}


def column(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of one policy: what came of the comparison first. The intervals have rows of their own, to be narrow."""
    rows: dict[str, Any] = {}
    for name in COMPARED:
        if name in figures:
            title = name.replace("_", " ")
            rows[title] = figures[name]
            rows[f"{title.split()[-1]} interval"] = f"{figures[f'{name}_low']:.3g} to {figures[f'{name}_high']:.3g}"
    return rows | {name: value for name, value in figures.items() if not name.startswith(COMPARED)}
