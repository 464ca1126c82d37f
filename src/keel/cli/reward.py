"""Train a reward model on human preferences: pairs (prompt, chosen, rejected) or rankings (prompt, responses, ranks).

With --members it is an ensemble. report.html in the run folder shows how often the model is right on held-out prompts,
and whether its scores are calibrated. A model that fails the gate is saved, but the exit code is 1 and `keel train`
refuses the model.

example:
  keel reward --output runs/reward --model distilgpt2 \\
      --data.path rankings.jsonl --loss listwise
  keel reward --output runs/reward --model distilgpt2 \\
      --data.path rankings.jsonl --members 4 --gate accuracy=0.65,ece=0.05
"""

from collections.abc import Mapping
from typing import Any

from keel.cli.help import Verb
from keel.cli.settings import read_command
from keel.cli.tables import format_interval, print_table
from keel.config import RewardConfig
from keel.errors import GateFailed

VERB = Verb("reward", RewardConfig, str(__doc__), flags=("resume",))


def run(arguments: list[str]) -> dict[str, Any]:
    """Train the reward model, and return its metrics on the held-out prompts. Raises GateFailed."""
    command = read_command(VERB, arguments)
    from keel.report.reward_report import write_reward_report
    from keel.run.reward_files import shortfalls
    from keel.supervised.reward import reward
    from keel.world import is_main_process

    settings = command.settings
    metrics = reward(settings, resume=command.resume)
    if "accuracy" in metrics and is_main_process():
        print_reward_metrics(metrics)
        print(f"report: {write_reward_report(settings.output)}")
    print(f"reward model: {settings.output}/model")
    # After the report: a model that fails its gate is saved, and its report shows why.
    failed = shortfalls(settings.gate, metrics)
    if failed:
        error = GateFailed(f"below the gate: {'; '.join(failed)}", where=f"{settings.output}/model")
        error.metrics = metrics
        raise error
    return metrics


def print_reward_metrics(metrics: Mapping[str, float]) -> None:
    """Print the held-out metrics beside those of two baselines: comparing lengths, and a constant score."""
    preferred = "longer" if metrics["length_sign"] > 0 else "shorter"
    columns = {
        "reward model": {
            "accuracy": metrics["accuracy"],
            "loss": metrics["loss"],
            "calibration error": metrics["calibration_error"],
        },
        f"length alone ({preferred} is better)": {"accuracy": metrics["length_accuracy"]},
        "constant": {"accuracy": metrics["constant_accuracy"], "loss": metrics["constant_loss"]},
    }
    print_table("on held-out prompts", columns)
    print(f"accuracy {format_interval(metrics, 'accuracy')}, a 95% interval over prompts")
    if "uncalibrated_error" in metrics:
        initial = f"calibration error {metrics['uncalibrated_error']:.3f}, loss {metrics['uncalibrated_loss']:.3f}"
        print(f"scores divided by a temperature of {metrics['temperature']:.3g}; without it: {initial}")
    else:
        calibrated = f"calibration error {metrics['calibrated_error']:.3f}, loss {metrics['calibrated_loss']:.3f}"
        print(f"best temperature {metrics['temperature']:.3g}; fitted on other held-out prompts it gives {calibrated}")
    if metrics["rankings_left_out"]:
        print(
            f"rankings left out because they contain no preference or have weight 0: {metrics['rankings_left_out']:.0f}"
        )
    if metrics["prompts_on_both_sides"]:
        shared = f"{metrics['prompts_on_both_sides']:.0f} held-out prompts"
        print(f"{shared} are also in the training data, so these metrics are too optimistic")
