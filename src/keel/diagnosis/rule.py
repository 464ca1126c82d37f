"""A rule of the doctor: when something holds, how to tell of it, what may have caused it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keel.diagnosis.findings import SEVERITIES, Cause, Change, Evidence, Finding
from keel.run.read.run import Run, Series
from keel.run.read.series import highest, last, trailing_mean, window

Levels = NDArray[np.int8]
FINE, NOTICE, WARNING, CRITICAL = range(4)
USUAL_KL = 0.05  # kl_coef over the scores' deviation; from 0.01 to 0.2 is usual


@dataclass(frozen=True)
class Rule:
    """How a fault is recognised and told. All functions look at a run of S steps; `levels` -> [S], of FINE to CRITICAL,
    may use of step t only what was known by then."""

    name: str
    title: str
    stage: str
    levels: Callable[[Run], Levels]
    evidence: Callable[[Run], Sequence[Evidence]]
    causes: Callable[[Run], Sequence[Cause]]
    patience: int = 3
    """steps in a row in which it must hold before it is said, and twice as many without it until it is over"""
    follows: tuple[str, ...] = ()
    """names of the rules whose findings explain this one"""
    lasts: bool = False
    """an event: once seen it stays"""
    began: Callable[[Run, int], int] = lambda run, place: place
    """the place where something began that was first seen at a later one"""
    of_itself: Callable[[Run], bool] = lambda run: False
    """whether the run shows that it follows from nothing else, whatever else there is"""


def rule_findings(rule: Rule, run: Run) -> list[Finding]:
    """The rule's findings, of which at most the last is open."""
    found = []
    for first, until, severest, is_open in spans(rule.levels(run), rule.patience, rule.lasts):
        seen = run.until(int(run.steps[until]))  # a finding may be open for some steps in which it no longer holds
        found.append(
            Finding(
                name=rule.name,
                title=rule.title,
                severity=SEVERITIES[CRITICAL - severest],
                stage=rule.stage,
                first_step=int(run.steps[rule.began(run, first)]),
                last_step=None if is_open else int(run.steps[until]),
                evidence=tuple(rule.evidence(seen)),
                causes=tuple(sorted(rule.causes(seen), key=_doubt)),
                last_seen=int(run.steps[until]),
            )
        )
    return found


def _doubt(cause: Cause) -> int:
    """The more speaks for a cause and the less against it, the earlier it stands; else as its rule has it."""
    return len(cause.speaks_against) - len(cause.speaks_for)


def spans(levels: Levels, patience: int, lasts: bool = False) -> list[tuple[int, int, int, bool]]:
    """(first place, last place, severity, whether it is open) of each span of levels above FINE.

    A span begins with the first of `patience` places in a row, and is over after twice as many places without it. Its
    severity is the highest level that held for so long.
    """
    found: list[tuple[int, int, int, bool]] = []
    begun: int | None = None
    streak = calm = last = 0
    for place, level in enumerate(levels.tolist()):
        streak, calm, last = (streak + 1, 0, place) if level else (0, calm + 1, last)
        if begun is None and streak >= patience:
            begun = place - patience + 1
        elif begun is not None and calm >= 2 * patience and not lasts:
            found.append((begun, last, _severity(levels[begun:place], patience), False))
            begun = None
    if begun is not None:
        found.append((begun, last, _severity(levels[begun:], patience), True))
    return found


def _severity(levels: Levels, patience: int) -> int:
    """The highest level held for `patience` places in a row."""
    for level in (CRITICAL, WARNING):
        held = np.convolve(levels >= level, np.ones(patience), mode="valid")
        if len(held) and held.max() >= patience:
            return level
    return NOTICE


def levels(*bounds: tuple[NDArray[np.bool_], int]) -> Levels:
    """The highest level whose condition [S] holds. levels((mild, WARNING), (grave, CRITICAL)) -> [S]"""
    result = np.zeros(len(bounds[0][0]), dtype=np.int8)
    for holds, level in bounds:
        result = np.maximum(result, np.where(holds, level, FINE)).astype(np.int8)
    return result


def names(words: str) -> tuple[str, ...]:
    """Names of rules, separated by blanks."""
    return tuple(words.split())


def scale_setting(run: Run, setting: str, factor: float, default: float | None = None) -> Change:
    """Multiply a setting: "1e-05 (it is 3e-05)"."""
    now = run.setting(setting, default)
    return Change(setting, f"{now * factor:.2g} (it is {now:g})" if now else f"{factor:g} times what it is")


def raise_kl(run: Run, factor: float) -> Change:
    """A larger kl_coef; where there is none yet, a usual one for scores of this scale."""
    if last(run["objective/kl_coef"]) > 0:
        return scale_setting(run, "algorithm.kl_coef", factor)
    return Change("algorithm.kl_coef", f"{USUAL_KL * kl_unit(run):.2g} (it is 0)")


def kl_units(run: Run) -> Series:
    """What kl_coef is large or small beside: the deviation of what the KL is weighed against. [S]"""
    return advantage_deviations(run) if run.setting("algorithm.kl_in") == "loss" else score_deviations(run)


def advantage_deviations(run: Run) -> Series:
    """What a term of the loss is large or small beside: 1 where the algorithm brings its advantages to this deviation,
    else about that of the scores. [S]"""
    by = {"grpo": "normalize_std", "rloo": None}.get(str(run.setting("algorithm.name")), "whiten_advantages")
    brought = by and run.setting(f"algorithm.{by}", True)
    return np.ones(len(run.steps)) if brought else score_deviations(run)


def kl_unit(run: Run) -> float:
    """The last of `kl_units`; 1 where it is not known or nothing."""
    unit = last(kl_units(run))
    return unit if unit > 0 else 1.0


def score_deviations(run: Run) -> Series:
    """Of the scores that the policy is paid, where they differed most so far: those of a policy that has learned are
    alike. [S]"""
    return highest(trailing_mean(run["objective/shaped_scores_std"], window(run)))


def score_deviation(run: Run) -> float:
    """The last of `score_deviations`; 1 where it is not known or nothing."""
    spread = last(score_deviations(run))
    return spread if spread > 0 else 1.0


def is_failure(run: Run, *errors: str) -> bool:
    """Whether the run failed with an error of this name."""
    return run.state.standing == "failed" and run.state.what.startswith(errors)


def change_evidence(run: Run, metric: str, note: str = "") -> Evidence:
    """How a figure changed from the first window to the last."""
    width = window(run)
    before, now = run[metric][:width], run[metric][-width:]
    means = [format_evidence(last(trailing_mean(part, width))) for part in (before, now)]
    return Evidence(
        metric, f"{means[0]} in the first {width} steps, {means[1]} in the last" + (f"; {note}" if note else "")
    )


def format_evidence(value: float) -> str:
    """A number in evidence."""
    return f"{value:.3g}" if np.isfinite(value) else "not measured"


def is_now(run: Run, metric: str, note: str = "") -> Evidence:
    """The mean of a figure over the last window."""
    value = format_evidence(last(trailing_mean(run[metric][-window(run) :], window(run))))
    return Evidence(metric, value + (f"; {note}" if note else ""))


def applicable_texts(*pairs: tuple[bool, str]) -> tuple[str, ...]:
    """Those whose condition is true."""
    return tuple(text for true, text in pairs if true)


def ratio(above: float, below: float) -> float:
    """above / below, infinite where there is nothing below."""
    return above / below if below else float("inf")
