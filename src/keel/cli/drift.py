"""Test whether the reward models of a run still apply to today's prompts, and in which slices they do not.

The policy of the run responds to today's prompts and to its training prompts, and the reward models of the run score
both. Every metric is tested; the probability of any false alarm among all tests is at most 5%. docs/evaluation.md
explains each metric. The exit code is 0 whatever the verdict; scripts read it with --json.

example:
  keel drift runs/ppo --prompts.path today.jsonl --slices topic
  keel drift runs/ppo --answers logged.jsonl --output drift.json
"""

from collections.abc import Mapping
from typing import Any

from rich.markup import escape

from keel.cli.settings import read_command
from keel.cli.tables import show
from keel.config import DriftConfig
from keel.terminal import literal

ALARMING = ("does not apply", "in doubt")
MEANS = {
    "applies": "the reward model applies to these prompts as far as can be measured",
    "in doubt": "in doubt: these prompts or their scores are not those of the training; people should look",
    "does not apply": "does not apply: it is asked what it does not know; do not believe its scores here",
    "too few to say": "too few answers to say whether the reward model applies",
}


def run(arguments: list[str]) -> dict[str, Any]:
    """Returns figures, tests and verdict."""
    command = read_command("drift", DriftConfig, arguments, str(__doc__), plain="run")
    from keel.evaluation.drift.drift import drift

    metrics = drift(command.settings)
    rows = metrics["rows"]
    print_drift_metrics(f"{rows['today']} answers of today, {rows['training']} to training prompts", metrics["figures"])
    for name, own in metrics["slices"].items():
        moved = {metric: found for metric, found in own["figures"].items() if found["says"] == "moved"}
        if moved:
            title = f"{name}: {own['rows']} today, {describe_training_count(name, own['of_training'])}"
            print_drift_metrics(escape(literal(title)), moved)
    for note in metrics["notes"]:
        print(f"note: {literal(note)}")
    print_verdict(metrics)
    if command.settings.output:
        print(f"figures and answers: {command.settings.output}")
    return metrics


def describe_training_count(name: str, count: int | None) -> str:
    """How many of the training are of this slice, where its prompts could be of it at all."""
    if count is None:
        return f"the training prompts have no column {name.partition('=')[0]}"
    return f"{count or 'none'} in the training"


def print_drift_metrics(title: str, metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """One row for each figure."""
    from keel.evaluation.drift.verdict import small

    cells = {
        "training": lambda found: f"{found['training']:.3g}",
        "today": lambda found: f"{found['today']:.3g}",
        "distance": lambda found: f"{found['distance']:.2f}",
        "p": lambda found: small(found["p"]),
        "": lambda found: found["says"],
    }
    show(title, {name: {metric: of(found) for metric, found in metrics.items()} for name, of in cells.items()})


def print_verdict(metrics: Mapping[str, Any]) -> None:
    """In plain words, the reasons under each."""
    verdict = metrics["verdict"]
    print(f"verdict: {MEANS[verdict['reward_model']]}")
    print_reasons(verdict["because"]["all"])
    for standing in dict.fromkeys([*ALARMING, *verdict["slices"].values()]):
        names = [name for name, each in verdict["slices"].items() if each == standing]
        if names and standing not in ALARMING:
            print(f"{standing}: {', '.join(map(literal, names))}")
            continue
        for name in names:
            print(f"{standing}: {literal(name)}")
            print_reasons(verdict["because"][name])
    if verdict["moved_slices"] or verdict["reward_model"] in ALARMING:
        print("what to do: let people rank answers to these prompts, train the reward model on old and new rankings,")
        print("then the policy; where people still agree with the reward model (keel reward reports it), it holds")
        print(
            f"  keel rank {metrics['to_rank']['file']}"
            if "to_rank" in metrics
            else "  --output FILE writes what to rank"
        )


def print_reasons(reasons: list[str]) -> None:
    for reason in reasons:
        print(f"  {literal(reason)}")
