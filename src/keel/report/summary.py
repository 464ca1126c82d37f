"""The head of a report: the verdict in one sentence, and the main metrics at the first and last steps."""

from collections.abc import Iterator, Sequence
from math import floor, log10
from typing import Any

import numpy as np

from keel.diagnosis.findings import Diagnosis, Finding
from keel.run.read.curves import is_sparse, labels, thin_curve, trend
from keel.run.read.run import Run
from keel.run.read.series import window

MAIN = ("objective/scores", "evaluate/score", "objective/kl", "response/length", "response/truncated", "policy/entropy")
CRITIC = ("critic/explained_variance",)
LEARNING = ("loss", "accuracy", "perplexity", "margin", "calibration_error", "forward_kl")
HEADLINE = ("objective/scores", "objective/kl", "response/length")
MAX_TILES = 8
WIDTH, HEIGHT = 200.0, 44.0
"""Size of a small plot in SVG units; report_macros.html repeats it."""


def doctor_summary(diagnosis: Diagnosis) -> str:
    """Summarise a diagnosis in one sentence."""
    still_open = [finding for finding in diagnosis.findings if finding.is_open]
    if diagnosis.verdict == "unknown":
        return "No diagnosis yet: no step has been logged."
    if not still_open:
        closed = len(diagnosis.findings)
        past = f"; {closed} earlier {'finding is' if closed == 1 else 'findings are'} no longer open" if closed else ""
        return f"No problems found at step {diagnosis.last_step}{past}."
    first = next(finding for finding in still_open if finding.severity == diagnosis.verdict)
    others = len(still_open) - 1
    more = f" ({others} more {'finding' if others == 1 else 'findings'})" if others else ""
    cause = f", which follows from {first.follows_from}" if first.follows_from else ""
    return f"{diagnosis.verdict.capitalize()} since step {first.first_step}: {first.title.rstrip('.')}{cause}{more}."


def tiles(run: Run) -> list[dict[str, Any]]:
    """Return [{"label", "figure", "first", "last", "plot"}] for the main metrics that the run logged."""
    return [tile(run, metric, label) for metric, label in _main_metrics(run)][:MAX_TILES]


def tile(run: Run, metric: str, label: str) -> dict[str, Any]:
    """Return the means of the first and of the last measured steps as text. Without a second one, `first` is None."""
    first, last = ends(run, metric)
    return {
        "figure": metric,
        "label": label,
        "first": format_value(first) if np.isfinite(run[metric]).sum() > 1 else None,
        "last": format_value(last),
        "plot": small_plot(run, metric),
    }


def run_rows(runs: Sequence[Run], diagnoses: Sequence[Diagnosis]) -> list[dict[str, Any]]:
    """Return the rows of the table of several runs: [{"says", "finding", "cells": [{"label", "first", "last"}]}].

    All rows have the same columns.
    """
    labels_by_run = [dict(_main_metrics(run)) for run in runs]
    all_labels = {metric: label for run_labels in reversed(labels_by_run) for metric, label in run_labels.items()}
    columns = [metric for metric in HEADLINE if metric in all_labels] or list(all_labels)[:3]
    return [
        {
            "says": doctor_summary(diagnosis),
            "finding": diagnosis.findings[0] if diagnosis.findings else None,
            "cells": [tile(run, metric, all_labels[metric]) for metric in columns],
        }
        for run, diagnosis in zip(runs, diagnoses, strict=True)
    ]


def ends(run: Run, metric: str) -> tuple[float, float]:
    """Return the means over the first and the last window of measured steps.

    The window of a short run is a third of its steps. Both are NaN if nothing was measured.
    """
    values = run[metric][np.isfinite(run[metric])]
    if not len(values):
        return float("nan"), float("nan")
    width = max(1, min(window(run), len(values) // 3))
    return float(values[:width].mean()), float(values[-width:].mean())


def small_plot(run: Run, metric: str, finding: Finding | None = None) -> dict[str, Any] | None:
    """Return a curve as the path of an SVG of WIDTH x HEIGHT, and the span of a finding; None without points.

    A long curve is drawn as its trend. With a finding, whose evidence may be a spike, it is drawn with its extremes.
    """
    if not run.has(metric):
        return None
    measured = np.isfinite(run[metric]) if is_sparse(metric) else np.full(len(run.steps), True)
    smooth = trend(run.steps, run[metric]) if finding is None else None
    thinned = thin_curve(run.steps[measured], run[metric][measured], most=150)
    steps, values = (smooth["steps"], smooth["values"]) if smooth else thinned
    drawn = np.array(values, dtype=np.float64)
    low, high = float(np.nanmin(drawn)), float(np.nanmax(drawn))
    first, last = int(run.steps[0]), int(run.steps[-1])

    def x(step: float) -> float:
        return WIDTH * (step - first) / max(last - first, 1)

    points = [None if v is None else (x(s), _y(v, low, high)) for s, v in zip(steps, values, strict=True)]
    span = None
    if finding is not None:
        begin, end = x(finding.first_step), x(last if finding.last_step is None else finding.last_step)
        span = (round(min(begin, WIDTH - 3), 1), round(max(end - begin, 3), 1))  # at least 3 wide, to be visible
    path = " ".join(_strokes(points))
    return {"path": path, "span": span, "low": format_value(low), "high": format_value(high), "steps": (first, last)}


def format_value(value: float | None) -> str:
    """Format a number with three significant digits, or an integer in full. "none" if it is missing."""
    if value is None or not np.isfinite(value):
        return "none"
    if value == 0:
        return "0"
    exponent = floor(log10(abs(value)))
    if not -4 <= exponent <= 5:
        text = f"{value:.2e}"
    elif value == int(value) or exponent >= 2:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.{2 - exponent}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def _main_metrics(run: Run) -> Iterator[tuple[str, str]]:
    metric_labels = labels(run)
    if run.stage == "train":
        held_out = [f"rewards/{name}" for name in run.held_out_scorers()]
        wanted = [MAIN[0], *held_out, *MAIN[1:], *CRITIC]
    else:
        wanted = [
            metric for metric in metric_labels if metric.startswith(f"{run.stage}/") and metric.endswith(LEARNING)
        ]
    yield from ((metric, metric_labels[metric]) for metric in wanted if metric in metric_labels)


def _y(value: float, low: float, high: float) -> float:
    share = (value - low) / (high - low) if high > low else 0.5
    return 3 + (HEIGHT - 6) * (1 - share)  # a margin of 3 for the width of the line


def _strokes(points: list[tuple[float, float] | None]) -> Iterator[str]:
    """Yield SVG path commands. A gap ends a stroke.

    A single point is a stroke of length zero, which its round end makes visible.
    """
    previous = None
    for index, point in enumerate(points):
        following = points[index + 1] if index + 1 < len(points) else None
        if point is not None:
            command = "L" if previous is not None else "M"
            dot = " h0" if previous is None and following is None else ""
            yield f"{command}{point[0]:.1f} {point[1]:.1f}{dot}"
        previous = point
