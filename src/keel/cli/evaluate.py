"""Judge a policy on prompts it was not trained on: score, KL, length, entropy, and the win rate against another.

example:
  keel evaluate --policy runs/ppo/policy --against runs/sft/model --prompts.path heldout.jsonl \\
      --rewards '{"model": "runs/reward/model"}'
"""

from typing import Any

from keel.cli.settings import read_command
from keel.cli.tables import interval, show
from keel.config import EvaluateConfig


def run(arguments: list[str]) -> dict[str, Any]:
    """Returns the figures of the table."""
    command = read_command("evaluate", EvaluateConfig, arguments, str(__doc__))
    from keel.train.evaluate import evaluate

    figures = evaluate(command.settings)
    sides: dict[str, Any] = {side: figures[side] for side in ("policy", "against") if side in figures}
    show(f"{figures['prompts']} prompts, {figures['responses_per_prompt']} answers to each", sides)
    if "win_rate" in figures:
        print(f"win rate         {interval(figures, 'win_rate')}, ties count half ({figures['ties']:.3g} of all pairs)")
        print(f"score difference {interval(figures, 'score_difference')}  (95% intervals over prompts)")
    if command.settings.output:
        print(f"figures and answers: {command.settings.output}")
    return figures
