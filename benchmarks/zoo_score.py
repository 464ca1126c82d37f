"""Evaluate `keel doctor` on the zoo, as if it had run after each step of every run."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from zoo_cases import CASES

from keel.diagnosis.doctor import diagnose
from keel.diagnosis.findings import Diagnosis
from keel.run.read.run import Run, State, read_run

LOUD = ("critical", "warning")


@dataclass(frozen=True)
class Opinion:
    """The doctor's diagnosis of a run at each of its steps."""

    name: str
    expected: tuple[str, ...]
    half: int  # the step by which a diagnosis should be there
    steps: tuple[int, ...]
    diagnoses: tuple[Diagnosis, ...]

    @property
    def first_names(self) -> list[str]:
        """Return the first finding at each step."""
        return [said.findings[0].name if said.findings else "none" for said in self.diagnoses]

    @property
    def at_half(self) -> str:
        """Return the first finding at half of the run, or at the last step of a run that ended earlier."""
        known = [name for step, name in zip(self.steps, self.first_names, strict=True) if step <= self.half]
        return known[-1] if known else "none"

    @property
    def named_at(self) -> int | None:
        """Return the step from which a correct finding was first, and stayed first."""
        wrong = [i for i, name in enumerate(self.first_names) if name not in self.expected]
        start = wrong[-1] + 1 if wrong else 0
        return self.steps[start] if start < len(self.steps) else None

    @property
    def is_right(self) -> bool:
        return self.at_half in self.expected

    def alarms(self) -> list[str]:
        """Return every warning or critical finding that was open at some step, with its first step."""
        found: dict[tuple[str, str], int] = {}
        for step, said in zip(self.steps, self.diagnoses, strict=True):
            for finding in said.findings:
                if finding.severity in LOUD and finding.is_open:
                    found.setdefault((finding.severity, finding.name), step)
        return [f"{severity} {name} at {step}" for (severity, name), step in found.items()]


def score(runs: Path, wanted: Sequence[tuple[str, int]]) -> None:
    """Print the tables of these cases and seeds, and which of them do not exist."""
    made = [(name, seed) for name, seed in wanted if (runs / f"{name}-{seed}.truth.json").exists()]
    opinions = [opinion(runs / f"{name}-{seed}", CASES[name].expected) for name, seed in made]
    print_sick([found for found in opinions if found.expected])
    print_healthy([found for found in opinions if not found.expected])
    if missing := [f"{name}-{seed}" for name, seed in wanted if (name, seed) not in made]:
        print(f"\nnot made: {', '.join(missing)}")


def opinion(path: Path, expected: tuple[str, ...]) -> Opinion:
    run = read_run(path)
    steps = tuple(int(step) for step in run.steps)
    diagnoses = tuple(diagnose(as_it_was(run, step)) for step in steps)
    return Opinion(run.name, expected, run.planned // 2, steps, diagnoses)


def as_it_was(run: Run, step: int) -> Run:
    """Return the run as it was at a step. How it ended is known only at the last step."""
    whole = step == int(run.steps[-1])
    return run if whole else replace(run.until(step), state=State("running"))


def print_sick(opinions: Sequence[Opinion]) -> None:
    print("| sick run | expected | first diagnosis at half | right from step | |\n|---|---|---|---|---|")
    for found in opinions:
        place = "never" if found.named_at is None else str(found.named_at)
        verdict = "right" if found.is_right else "wrong"
        print(f"| {found.name} | {' or '.join(found.expected)} | {found.at_half} | {place} | {verdict} |")
    right = sum(found.is_right for found in opinions)
    at_last = sum(found.named_at is not None for found in opinions)
    named = [found.named_at for found in opinions if found.named_at is not None]
    print(f"\nright first diagnosis at half of the run: {right} of {len(opinions)}; at its end: {at_last}")
    if named:
        print(f"steps until named: median {statistics.median(named):g}, longest {max(named)}\n")


def print_healthy(opinions: Sequence[Opinion]) -> None:
    print("| healthy run | warnings and criticals, ever |\n|---|---|")
    for found in opinions:
        print(f"| {found.name} | {', '.join(found.alarms()) or 'none'} |")
    every = [alarm for found in opinions for alarm in found.alarms()]
    critical = sum(alarm.startswith("critical") for alarm in every)
    print(f"\nfalse alarms over {len(opinions)} healthy runs: {critical} critical, {len(every) - critical} warnings")
