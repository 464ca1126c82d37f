"""Train a policy on preference pairs or rankings, without a reward model (direct preference optimisation).

A pair is a row with the columns prompt, chosen and rejected; a ranking is a row with prompt, responses and ranks. The
data is the same as for `keel reward`. With --loss kto, a row may also be a single response with a label: prompt,
completion, and label true (desirable) or false.

example:
  keel dpo --output runs/dpo --model runs/sft/model \\
      --data.path rankings.jsonl --beta 0.1
"""

from collections.abc import Mapping
from typing import Any

from keel.cli.help import Verb
from keel.cli.settings import read_command
from keel.cli.tables import format_interval, print_table, select_metrics
from keel.config import DpoConfig

VERB = Verb("dpo", DpoConfig, str(__doc__), flags=("resume",))
ROWS = ("accuracy", "loss", "margin", "chosen_reward", "rejected_reward", "chosen_logprob", "forward_kl", "kl")


def run(arguments: list[str]) -> dict[str, Any]:
    """Train the policy, and return its metrics on the held-out prompts."""
    command = read_command(VERB, arguments)
    from keel.supervised.dpo import dpo

    metrics = dpo(command.settings, resume=command.resume)
    if "accuracy" in metrics:
        print_dpo_metrics(metrics, command.settings)
    print(f"policy: {command.settings.output}/policy")
    return metrics


def print_dpo_metrics(metrics: Mapping[str, float], settings: DpoConfig) -> None:
    """Print the held-out metrics beside those of comparing lengths, and warn if chosen responses became less likely."""
    columns = {"policy": select_metrics(metrics, [name for name in ROWS if name in metrics])}
    if "length_accuracy" in metrics:
        preferred = "longer" if metrics["length_sign"] > 0 else "shorter"
        columns[f"length alone ({preferred} is better)"] = {"accuracy": metrics["length_accuracy"]}
    print_table("on held-out prompts", columns)
    if "accuracy_low" in metrics:
        print(f"accuracy {format_interval(metrics, 'accuracy')}, a 95% interval over prompts")
    # The reward of a response is beta (log pi - log pi_ref), so this is the fall of its log-probability in nats.
    fall = -metrics["chosen_reward"] / settings.beta
    if fall > 0 and settings.has_reference and not settings.length_normalized:
        initial = metrics["chosen_logprob"] + fall
        print(
            f"chosen responses became less likely, by {fall:.3g} nats each (initial log-probability {initial:.4g}): "
            "if the policy writes worse responses, raise beta, or lower optim.learning_rate or epochs"
        )
    if metrics["prompts_on_both_sides"]:
        shared = f"{metrics['prompts_on_both_sides']:.0f} held-out prompts"
        print(f"{shared} are also in the training data, so these metrics are too optimistic")
