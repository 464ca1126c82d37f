"""metrics.jsonl: what training writes is what the doctor, the reports and the pages read."""

import json
import warnings
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import pytest

from keel.diagnosis.rules import POLICY_LEARNING, SUPERVISED
from keel.run.read.curves import OTHER, metric_groups
from keel.run.read.run import Run

from .conftest import LEARNING, Runs

NO_CRITIC = ("reinforce", "rloo", "grpo")
# Figures that a rule may ask for in vain, and the runs that do not write them.
OPTIONAL: dict[str, tuple[str, ...]] = {
    "groups/*": ("ppo", "shared", "a2c", "reinforce"),  # one response a prompt
    "critic/*": NO_CRITIC,
    "loss/value": NO_CRITIC,
    "outside_range/*": tuple(LEARNING),  # of functions; that of the reward model is looked for below
    "evaluate/*": ("shared", "a2c", *NO_CRITIC),  # evaluate.every is 0
    "sft/*accuracy": ("sft",),  # the rules of the supervised stages are the same
    "dpo/eval_*": ("sft", "reward"),
}


class Asked(dict[str, Any]):
    """Columns of a run that remember what was asked for."""

    def __init__(self, columns: Any) -> None:
        super().__init__(columns)
        self.names: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)


def asked(run: Run) -> set[str]:
    """The figures that the rules of its stage read: their levels, and their evidence and causes."""
    columns = Asked(run.columns)
    recorded = replace(run, columns=columns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # means of nothing: a rule that does not hold is asked for its evidence too
        for rule in POLICY_LEARNING if run.stage == "train" else SUPERVISED:
            rule.levels(recorded)
            for part in (rule.evidence, rule.causes):
                with suppress(ValueError, IndexError):
                    part(recorded)
    return columns.names


@pytest.mark.parametrize("name", [*LEARNING, "sft", "reward", "dpo"])
def test_what_the_rules_read_is_written(name: str, runs: Runs) -> None:
    run = runs.run(name)
    missing = asked(run) - run.columns.keys()
    allowed = [pattern for pattern, names in OPTIONAL.items() if name in names]
    assert sorted(figure for figure in missing if not any(fnmatchcase(figure, each) for each in allowed)) == []


def test_what_is_optional_is_written_by_some_run(runs: Runs) -> None:
    """A figure that no run writes would be a rule that never speaks."""
    found = [runs.run(name) for name in LEARNING]
    written = {figure for run in found for figure in run.columns}
    wanted = {figure for run in found for figure in asked(run)}
    functions = {f"outside_range/{name}" for run in found for name in run.scorer_weights()} - written
    assert sorted(wanted - written - functions) == []
    for run, judge in zip(found, [*["reward"] * (len(found) - 1), "ensemble"], strict=True):
        assert f"outside_range/{judge}" in run.columns.keys() & asked(run)


@pytest.mark.parametrize("name", LEARNING)
def test_each_scorer_of_the_settings_has_its_figures(name: str, runs: Runs) -> None:
    run = runs.run(name)
    judge = "ensemble" if name == "grpo" else "reward"
    assert list(run.scorer_weights()) == ["quality_keyword", "quality", "score", "score_2", judge]
    assert run.held_out_scorers() == ["quality", "score_2"]
    for scorer in run.scorer_weights():
        for family in ("rewards", "agreement", "spread"):
            assert f"{family}/{scorer}" in run.columns
    families = {figure for figure in run.columns if figure.startswith("rewards/")}
    assert families == {f"rewards/{scorer}" for scorer in run.scorer_weights()}
    assert f"outside_range/{judge}" in run.columns
    assert list(run.reward_models()) == [judge]
    assert run.has("logged/words")


@pytest.mark.parametrize("name", [*LEARNING, "sft", "reward", "dpo"])
def test_the_reader_has_every_number_that_was_written(name: str, runs: Runs) -> None:
    run = runs.run(name)
    lines = [json.loads(line) for line in (runs.path(name) / "metrics.jsonl").read_text().splitlines()]
    assert run.steps.tolist() == [line.pop("step") for line in lines]
    for place, line in enumerate(lines):
        for figure, value in line.items():
            assert value is None or run[figure][place] == value
    assert {figure for line in lines for figure in line} == set(run.columns)


@pytest.mark.parametrize("name", [*LEARNING, "sft", "reward", "dpo"])
def test_every_figure_has_words_in_the_report(name: str, runs: Runs) -> None:
    titles = {group["title"]: [curve["figure"] for curve in group["curves"]] for group in metric_groups(runs.run(name))}
    assert titles.get(OTHER, []) == []
    assert titles
