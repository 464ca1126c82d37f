"""Train a reward model on human preferences: pairs (prompt, chosen, rejected) or rankings (prompt, responses, ranks).

With --members it is an ensemble. report.html in the run folder shows how often it is right on held-out prompts, and
whether its scores are calibrated. A model that fails the gate is saved, but the exit code is 1 and `keel train` refuses
the model.

example:
  keel reward --output runs/reward --model distilgpt2 \\
      --data.path rankings.jsonl --loss listwise
  keel reward --output runs/reward --model distilgpt2 \\
      --data.path rankings.jsonl --members 4 --gate accuracy=0.65,ece=0.05
"""

from collections.abc import Mapping
from typing import Any

from keel.cli.settings import read_command
from keel.cli.tables import format_interval, show
from keel.config import RewardConfig
from keel.errors import GateFailed


def run(arguments: list[str]) -> dict[str, Any]:
    """Returns the figures on the held-out prompts. Raises GateFailed."""
    command = read_command("reward", RewardConfig, arguments, str(__doc__), flags=("resume",))
    from keel.report.reward_report import write_reward_report
    from keel.run.reward_files import shortfalls
    from keel.supervised.reward import reward

    settings = command.settings
    metrics = reward(settings, resume=command.resume)
    if "accuracy" in metrics:
        print_reward_metrics(metrics)
        print(f"the report: {write_reward_report(settings.output)}")
    print(f"the reward model: {settings.output}/model")
    failed = shortfalls(settings.gate, metrics)
    if failed:
        error = GateFailed(f"below the gate: {'; '.join(failed)}", where=f"{settings.output}/model")
        error.metrics = metrics
        raise error
    return metrics


def print_reward_metrics(metrics: Mapping[str, float]) -> None:
    """The reward model, length alone and a constant side by side."""
    prefers = "longer" if metrics["length_sign"] > 0 else "shorter"
    model = {name: metrics[name] for name in ("accuracy", "loss")}
    error = {"calibration error": metrics["calibration_error"]}
    length = {"accuracy": metrics["length_accuracy"]}
    constant = {"accuracy": metrics["constant_accuracy"], "loss": metrics["constant_loss"]}
    columns = {"reward model": model | error, f"length alone ({prefers} is better)": length, "constant": constant}
    show("on held-out prompts", columns)
    print(f"accuracy {format_interval(metrics, 'accuracy')}, a 95% interval over prompts")
    if "uncalibrated_error" in metrics:
        before = f"calibration error {metrics['uncalibrated_error']:.3f}, loss {metrics['uncalibrated_loss']:.3f}"
        print(f"divided by a temperature of {metrics['temperature']:.3g}; before: {before}")
    else:
        after = f"calibration error {metrics['calibrated_error']:.3f}, loss {metrics['calibrated_loss']:.3f}"
        print(f"a temperature of {metrics['temperature']:.3g} fits; one fitted on other held-out prompts gives {after}")
    if metrics["rankings_left_out"]:
        print(f"rankings left out, since they prefer nothing or weigh nothing: {metrics['rankings_left_out']:.0f}")
    if metrics["prompts_on_both_sides"]:
        shared = f"{metrics['prompts_on_both_sides']:.0f} held-out prompts"
        print(f"{shared} are among those learned from: a flattering figure")
