"""Train a policy on human preferences directly, without a reward model: pairs or rankings, as for `keel reward`.

A pair is a row of prompt, chosen, rejected; a ranking is a row of prompt, responses, ranks.

example:
  keel dpo --output runs/dpo --model runs/sft/model \\
      --data.path rankings.jsonl --beta 0.1
"""

from collections.abc import Mapping
from typing import Any

from keel.cli.settings import read_command
from keel.cli.tables import format_interval, select_metrics, show
from keel.config import DpoConfig

ROWS = ("accuracy", "loss", "margin", "chosen_reward", "rejected_reward", "chosen_logprob", "forward_kl")


def run(arguments: list[str]) -> dict[str, Any]:
    """Returns the figures on the held-out prompts."""
    command = read_command("dpo", DpoConfig, arguments, str(__doc__), flags=("resume",))
    from keel.supervised.dpo import dpo

    metrics = dpo(command.settings, resume=command.resume)
    if "accuracy" in metrics:
        print_dpo_metrics(metrics, command.settings.beta)
    print(f"the policy: {command.settings.output}/policy")
    return metrics


def print_dpo_metrics(metrics: Mapping[str, float], beta: float) -> None:
    """The policy beside length alone, and the sign of the method's known failure."""
    prefers = "longer" if metrics["length_sign"] > 0 else "shorter"
    length = {"accuracy": metrics["length_accuracy"]}
    show(
        "on held-out prompts", {"policy": select_metrics(metrics, ROWS), f"length alone ({prefers} is better)": length}
    )
    print(f"accuracy {format_interval(metrics, 'accuracy')}, a 95% interval over prompts")
    fall = -metrics["chosen_reward"] / beta
    if fall > 0:
        start = metrics["chosen_logprob"] + fall
        print(
            f"chosen answers have become less likely, by {fall:.3g} nats each (log-probability {start:.4g} before): "
            "if what the policy writes is worse, raise beta, lower optim.learning_rate or epochs"
        )
    if metrics["prompts_on_both_sides"]:
        shared = f"{metrics['prompts_on_both_sides']:.0f} held-out prompts"
        print(f"{shared} are among those learned from: a flattering figure")
