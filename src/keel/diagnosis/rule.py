"""A rule of the doctor: the condition that it checks, what it reports, and its entry in docs/reference/findings.md."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from keel.diagnosis.findings import SEVERITIES, Cause, Evidence, Finding
from keel.run.read.run import Run, Series
from keel.run.read.series import Holds, at_least, at_most

Levels = NDArray[np.int8]
FINE, NOTICE, WARNING, CRITICAL = range(4)

MEASURED_IN_ZOO = "a rule of keel, measured on runs with this fault (`benchmarks/zoo.py`)"
TESTED_ON_SYNTHETIC_RUNS = "a rule of keel, tested on synthetic runs (`tests/diagnosis/`)"


class Bounds(NamedTuple):
    """The bound of one quantity for each severity; nan, which no comparison reaches: this severity has no bound."""

    warning: float = nan
    critical: float = nan
    notice: float = nan


@dataclass(frozen=True)
class Threshold:
    """A row of a rule's table: a quantity, and the bound for each severity as text."""

    quantity: str
    notice: str = ""
    warning: str = ""
    critical: str = ""


@dataclass(frozen=True)
class Documentation:
    """A rule's entry in docs/reference/findings.md. Bounds are formatted from the constants that the code uses."""

    measure: str
    """what is measured, as a formula in words and metric names"""
    thresholds: tuple[Threshold, ...]
    source: str
    combine: str = ""
    """how the rows of the table combine; empty for a table of one row"""
    note: str = ""
    """what is not reported, and why"""


@dataclass(frozen=True)
class Rule:
    """A fault that the doctor recognises. Functions take a run of S steps.

    `levels` returns [S], from FINE to CRITICAL. The level of step t depends only on data up to step t, so a finding is
    the same during the run and after it.
    """

    name: str
    title: str
    """summary, one sentence"""
    stage: str
    """the part of the method to look at"""
    levels: Callable[[Run], Levels]
    evidence: Callable[[Run], Sequence[Evidence]]
    causes: Callable[[Run], Sequence[Cause]]
    documentation: Documentation
    patience: int = 3
    """consecutive steps for which it must hold before it is reported; it closes after twice as many without it"""
    follows: tuple[str, ...] = ()
    """names of the rules whose findings can explain this one"""
    stays_open: bool = False
    """an event: once reported it never closes"""
    find_start: Callable[[Run, int], int] = lambda run, index: index
    """the index at which the fault began, from the index at which the rule first held"""
    is_root_cause: Callable[[Run], bool] = lambda run: False
    """whether the run shows that no other finding explains this one"""


def rule_findings(rule: Rule, run: Run) -> list[Finding]:
    """Return the rule's findings in order of time. Only the last one can be open."""
    findings = []
    for first, last, severity, is_open in spans(rule.levels(run), rule.patience, rule.stays_open):
        # An open finding may no longer hold in the newest steps, which would then show no evidence of it.
        run_until_last = run.until(int(run.steps[last]))
        findings.append(
            Finding(
                name=rule.name,
                title=rule.title,
                severity=SEVERITIES[CRITICAL - severity],
                stage=rule.stage,
                first_step=int(run.steps[rule.find_start(run, first)]),
                last_step=None if is_open else int(run.steps[last]),
                evidence=tuple(rule.evidence(run_until_last)),
                causes=tuple(sorted(rule.causes(run_until_last), key=_doubt)),
                last_seen=int(run.steps[last]),
            )
        )
    return findings


def _doubt(cause: Cause) -> int:
    """Sort key: likelier causes first. The sort is stable, so ties keep the order of the rule."""
    return len(cause.speaks_against) - len(cause.speaks_for)


def spans(levels: Levels, patience: int, stays_open: bool = False) -> list[tuple[int, int, int, bool]]:
    """Return (first index, last index, severity, is open) of each span of levels above FINE.

    A span begins with `patience` consecutive indices above FINE and closes after twice as many at FINE. Its severity is
    the highest level that held for `patience` consecutive indices.
    """
    closed: list[tuple[int, int, int, bool]] = []
    start: int | None = None
    streak = calm = last = 0
    for index, level in enumerate(levels.tolist()):
        streak, calm, last = (streak + 1, 0, index) if level else (0, calm + 1, last)
        if start is None and streak >= patience:
            start = index - patience + 1
        elif start is not None and calm >= 2 * patience and not stays_open:
            closed.append((start, last, _severity(levels[start:index], patience), False))
            start = None
    if start is not None:
        closed.append((start, last, _severity(levels[start:], patience), True))
    return closed


def _severity(levels: Levels, patience: int) -> int:
    """Return the highest level that holds for `patience` consecutive indices."""
    for level in (CRITICAL, WARNING):
        streaks = np.convolve(levels >= level, np.ones(patience), mode="valid")
        if len(streaks) and streaks.max() >= patience:
            return level
    return NOTICE


def levels(*conditions: tuple[NDArray[np.bool_], int]) -> Levels:
    """Return the highest level whose condition [S] holds: levels((mild, WARNING), (severe, CRITICAL)) -> [S]."""
    result = np.zeros(len(conditions[0][0]), dtype=np.int8)
    for holds, level in conditions:
        result = np.maximum(result, np.where(holds, level, FINE)).astype(np.int8)
    return result


def levels_at_least(x: Series, bounds: Bounds) -> Levels:
    """Return the highest level whose bound x [S] reaches."""
    return _levels_by_bounds(x, bounds, at_least)


def levels_at_most(x: Series, bounds: Bounds) -> Levels:
    """Return the highest level whose bound x [S] does not exceed."""
    return _levels_by_bounds(x, bounds, at_most)


def _levels_by_bounds(x: Series, bounds: Bounds, compare: Callable[[Series, float], Holds]) -> Levels:
    pairs = ((bounds.notice, NOTICE), (bounds.warning, WARNING), (bounds.critical, CRITICAL))
    return levels(*((compare(x, bound), level) for bound, level in pairs))


def threshold(quantity: str, bounds: Bounds, form: str = ">= {:g}") -> Threshold:
    """Return a row of a rule's table with each bound formatted by `form`."""
    cells = {name: "" if isnan(bound) else form.format(bound) for name, bound in bounds._asdict().items()}
    return Threshold(quantity, **cells)


def rule_names(words: str) -> tuple[str, ...]:
    """Split a text into names of rules."""
    return tuple(words.split())


def is_failure(run: Run, *errors: str) -> bool:
    """Whether the run failed with an error of one of these names."""
    return run.state.standing == "failed" and run.state.what.startswith(errors)
