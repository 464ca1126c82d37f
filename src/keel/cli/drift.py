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

from keel.cli.help import Verb
from keel.cli.settings import read_command
from keel.cli.tables import print_table
from keel.config import DriftConfig
from keel.terminal import literal

VERB = Verb("drift", DriftConfig, str(__doc__), positional="run")
ALARMING = ("does not apply", "in doubt")
MEANINGS = {
    "applies": "no sign that the reward model does not apply to these prompts",
    "in doubt": "in doubt: these prompts or their scores differ from those of the training; people should look",
    "does not apply": "does not apply: the reward model has not seen prompts like these; do not trust its scores here",
    "too few to say": "too few responses to tell whether the reward model applies",
}


def run(arguments: list[str]) -> dict[str, Any]:
    """Print and return metrics, tests and verdict."""
    command = read_command(VERB, arguments)
    from keel.evaluation.drift.drift import drift

    metrics = drift(command.settings)
    rows = metrics["rows"]
    title = f"{rows['today']} responses of today, {rows['training']} to training prompts"
    print_drift_metrics(title, metrics["figures"])
    for name, slice_metrics in metrics["slices"].items():
        moved = {metric: test for metric, test in slice_metrics["figures"].items() if test["says"] == "moved"}
        if moved:
            training_count = describe_training_count(name, slice_metrics["of_training"])
            print_drift_metrics(escape(literal(f"{name}: {slice_metrics['rows']} today, {training_count}")), moved)
    for note in metrics["notes"]:
        print(f"note: {literal(note)}")
    print_verdict(metrics)
    if command.settings.output:
        print(f"metrics and responses: {command.settings.output}")
    return metrics


def describe_training_count(name: str, count: int | None) -> str:
    """Describe how many training prompts are in a slice. `count` is None if they lack the column of the slice."""
    if count is None:
        return f"the training prompts have no column {name.partition('=')[0]}"
    return f"{count or 'none'} in the training"


def print_drift_metrics(title: str, metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a table with one row for each metric."""
    from keel.evaluation.drift.verdict import format_p_value

    formats = {
        "training": lambda test: f"{test['training']:.3g}",
        "today": lambda test: f"{test['today']:.3g}",
        "distance": lambda test: f"{test['distance']:.2f}",
        "p": lambda test: format_p_value(test["p"]),
        "": lambda test: test["says"],
    }
    print_table(
        title, {name: {metric: form(test) for metric, test in metrics.items()} for name, form in formats.items()}
    )


def print_verdict(metrics: Mapping[str, Any]) -> None:
    """Print the verdict on all prompts and on each slice, with reasons, and what to do."""
    verdict = metrics["verdict"]
    print(f"verdict: {MEANINGS[verdict['reward_model']]}")
    print_reasons(verdict["because"]["all"])
    for status in dict.fromkeys([*ALARMING, *verdict["slices"].values()]):
        names = [name for name, slice_status in verdict["slices"].items() if slice_status == status]
        if names and status not in ALARMING:
            print(f"{status}: {', '.join(map(literal, names))}")
            continue
        for name in names:
            print(f"{status}: {literal(name)}")
            print_reasons(verdict["because"][name])
    if verdict["moved_slices"] or verdict["reward_model"] in ALARMING:
        print("what to do: let people rank responses to these prompts, train the reward model on old and new rankings,")
        print("then train the policy. Where people agree with the reward model (`keel reward` reports it), it applies.")
        if "to_rank" in metrics:
            print(f"  keel rank {metrics['to_rank']['file']}")
        else:
            print("  --output FILE writes the responses to rank")


def print_reasons(reasons: list[str]) -> None:
    for reason in reasons:
        print(f"  {literal(reason)}")
