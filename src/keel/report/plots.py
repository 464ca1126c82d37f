"""The curves of a report: those of all runs by figure, and where the findings lie in them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from keel.diagnosis.findings import Diagnosis
from keel.report.summary import ends, format_value, small_plot
from keel.run.read.curves import OTHER, catalogue, metric_groups
from keel.run.read.run import Run

ALWAYS_OPEN = ("Learning", "Scores", "Responses", "Held-out evaluation")


def curve_groups(
    runs: Sequence[Run], diagnoses: Sequence[Diagnosis]
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """[{"title", "open", "curves"}] of figures that moved, and [{"figure", "label", "value"}] of those that did not.

    Each curve has {"figure", "label", "means", "says", "runs", "marks"}: `runs` as {"steps", "values", "trend"} or
    None, `says` for those who do not see the plot, and `marks` as {"run", "first", "last", "severity", "shown"} of
    every finding, `shown` if it rests on this figure. A group is open if it is of the first to look at, or a finding
    rests on one of its figures.
    """
    found = [
        {curve["figure"]: (group["title"], curve) for group in metric_groups(run) for curve in group["curves"]}
        for run in runs
    ]
    titles = dict.fromkeys([*catalogue(), OTHER])
    metrics = {metric: part for own in reversed(found) for metric, part in own.items()}
    order = dict.fromkeys(metric for own in found for metric in own)
    still = [metric for metric in order if not any(_moves(run, metric) for run in runs)]
    made = []
    for title in titles:
        curves = [metrics[metric][1] for metric in order if metrics[metric][0] == title and metric not in still]
        if curves:
            drawn = [_of_runs(runs, found, curve) | {"marks": _marks(diagnoses, curve["figure"])} for curve in curves]
            told = any(mark["shown"] for curve in drawn for mark in curve["marks"])
            made.append({"title": title, "open": told or title in ALWAYS_OPEN, "curves": drawn})
    return made, [_constant(runs, metrics[metric][1]) for metric in still]


def evidence_plots(run: Run, diagnosis: Diagnosis) -> list[list[dict[str, Any] | None]]:
    """For each finding and each of its evidence a small plot, or None."""
    return [[small_plot(run, part.figure, finding) for part in finding.evidence] for finding in diagnosis.findings]


def _of_runs(runs: Sequence[Run], found: Sequence[dict[str, Any]], curve: dict[str, Any]) -> dict[str, Any]:
    metric = curve["figure"]
    own = [made[metric][1] if metric in made else None for made in found]
    drawn = [part and {name: part[name] for name in ("steps", "values", "trend")} for part in own]
    sentences = [_sentence(run, metric) for run, part in zip(runs, own, strict=True) if part]
    words = {name: curve[name] for name in ("figure", "label", "means")}
    return words | {"runs": drawn, "says": f"{curve['label']}. {' '.join(sentences)}"}


def _sentence(run: Run, metric: str) -> str:
    first, last = ends(run, metric)
    low, high = np.nanmin(run[metric]), np.nanmax(run[metric])
    return (
        f"{run.name}: from {format_value(first)} to {format_value(last)}, "
        f"between {format_value(low)} and {format_value(high)}."
    )


def _moves(run: Run, metric: str) -> bool:
    values = run[metric][np.isfinite(run[metric])]
    return len(values) > 1 and bool(np.ptp(values) > 0)


def _constant(runs: Sequence[Run], curve: dict[str, Any]) -> dict[str, str]:
    values = dict.fromkeys(f"{np.nanmax(run[curve['figure']]):.6g}" for run in runs if run.has(curve["figure"]))
    return {"figure": curve["figure"], "label": curve["label"], "value": " / ".join(values)}


def _marks(diagnoses: Sequence[Diagnosis], metric: str) -> list[dict[str, Any]]:
    return [
        {
            "run": number,
            "first": finding.first_step,
            "last": diagnosis.last_step if finding.last_step is None else finding.last_step,
            "severity": finding.severity,
            "shown": any(part.figure == metric for part in finding.evidence),
        }
        for number, diagnosis in enumerate(diagnoses)
        for finding in diagnosis.findings
    ]
