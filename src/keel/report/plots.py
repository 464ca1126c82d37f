"""The curves of a report: one plot per metric with all runs, and the steps of the findings."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from keel.diagnosis.findings import Diagnosis
from keel.report.summary import ends, format_value, small_plot
from keel.run.read.curves import OTHER, catalogue, metric_groups
from keel.run.read.run import Run

OPEN_GROUPS = ("Learning", "Scores", "Responses", "Held-out evaluation")


def curve_groups(
    runs: Sequence[Run], diagnoses: Sequence[Diagnosis]
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Return the groups of curves, and the metrics that stayed constant.

    A group is open if it is in OPEN_GROUPS, or if a finding rests on one of its metrics.

    Returns:
        [{"title", "open", "curves"}] and [{"figure", "label", "value"}]. A curve has {"figure", "label", "means",
        "says", "runs", "marks"}. `says` describes it for screen readers. `runs` holds {"steps", "values", "trend"} or
        None for each run. `marks` holds {"run", "first", "last", "severity", "shown"} for each finding, where `shown`
        means that the finding rests on this metric.
    """
    by_run = [
        {curve["figure"]: (group["title"], curve) for group in metric_groups(run) for curve in group["curves"]}
        for run in runs
    ]
    titles = dict.fromkeys([*catalogue(), OTHER])
    # Reversed, so that the first run's description wins.
    metrics = {metric: entry for curves in reversed(by_run) for metric, entry in curves.items()}
    order = dict.fromkeys(metric for curves in by_run for metric in curves)
    constant = [metric for metric in order if not any(_varies_over_steps(run, metric) for run in runs)]
    groups = []
    for title in titles:
        curves = [metrics[metric][1] for metric in order if metrics[metric][0] == title and metric not in constant]
        if curves:
            plots = [_plot(runs, by_run, curve) | {"marks": _marks(diagnoses, curve["figure"])} for curve in curves]
            has_finding = any(mark["shown"] for plot in plots for mark in plot["marks"])
            groups.append({"title": title, "open": has_finding or title in OPEN_GROUPS, "curves": plots})
    return groups, [_constant(runs, metrics[metric][1]) for metric in constant]


def evidence_plots(run: Run, diagnosis: Diagnosis) -> list[list[dict[str, Any] | None]]:
    """Return a small plot, or None, for each item of evidence of each finding."""
    return [[small_plot(run, item.figure, finding) for item in finding.evidence] for finding in diagnosis.findings]


def _plot(runs: Sequence[Run], by_run: Sequence[dict[str, Any]], curve: dict[str, Any]) -> dict[str, Any]:
    metric = curve["figure"]
    curves = [entries[metric][1] if metric in entries else None for entries in by_run]
    points = [each and {name: each[name] for name in ("steps", "values", "trend")} for each in curves]
    sentences = [_sentence(run, metric) for run, each in zip(runs, curves, strict=True) if each]
    texts = {name: curve[name] for name in ("figure", "label", "means")}
    return texts | {"runs": points, "says": f"{curve['label']}. {' '.join(sentences)}"}


def _sentence(run: Run, metric: str) -> str:
    first, last = ends(run, metric)
    low, high = np.nanmin(run[metric]), np.nanmax(run[metric])
    return (
        f"{run.name}: from {format_value(first)} to {format_value(last)}, "
        f"between {format_value(low)} and {format_value(high)}."
    )


def _varies_over_steps(run: Run, metric: str) -> bool:
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
            "shown": any(item.figure == metric for item in finding.evidence),
        }
        for number, diagnosis in enumerate(diagnoses)
        for finding in diagnosis.findings
    ]
