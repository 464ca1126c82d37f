"""The first lines of a report: the verdict in one sentence, and the main figures from the first steps to the last."""

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
MOST = 8
WIDTH, HEIGHT = 200.0, 44.0
"""Of a small plot, in its own units."""


def doctor_summary(diagnosis: Diagnosis) -> str:
    """What the doctor says, in one sentence."""
    still = [finding for finding in diagnosis.findings if finding.is_open]
    if diagnosis.verdict == "unknown":
        return "There is nothing to judge yet: no step has been logged."
    if not still:
        over = len(diagnosis.findings)
        past = f"; {over} earlier {'finding is' if over == 1 else 'findings are'} over" if over else ""
        return f"Healthy: the doctor finds nothing wrong at step {diagnosis.last_step}{past}."
    first = next(finding for finding in still if finding.severity == diagnosis.verdict)
    others = len(still) - 1
    more = f" ({others} more {'finding' if others == 1 else 'findings'})" if others else ""
    why = f", which follows from {first.follows_from}" if first.follows_from else ""
    return f"{diagnosis.verdict.capitalize()} since step {first.first_step}: {first.title.rstrip('.')}{why}{more}."


def tiles(run: Run) -> list[dict[str, Any]]:
    """[{"label", "figure", "first", "last", "plot"}] of the main figures that the run has."""
    return [tile(run, metric, label) for metric, label in _main(run)][:MOST]


def tile(run: Run, metric: str, label: str) -> dict[str, Any]:
    """Means of the first and of the last steps that measured it, as text; a figure measured once has no `first`."""
    first, last = ends(run, metric)
    return {
        "figure": metric,
        "label": label,
        "first": format_value(first) if np.isfinite(run[metric]).sum() > 1 else None,
        "last": format_value(last),
        "plot": small_plot(run, metric),
    }


def run_rows(runs: Sequence[Run], diagnoses: Sequence[Diagnosis]) -> list[dict[str, Any]]:
    """For the table of several runs: [{"says", "first_finding", "cells": [{"label", "first", "last"}]}], with the same
    columns for all."""
    labels_of = [dict(_main(run)) for run in runs]
    known = {metric: label for own in reversed(labels_of) for metric, label in own.items()}
    columns = [metric for metric in HEADLINE if metric in known] or list(known)[:3]
    return [
        {
            "says": doctor_summary(diagnosis),
            "finding": diagnosis.findings[0] if diagnosis.findings else None,
            "cells": [tile(run, metric, known[metric]) for metric in columns],
        }
        for run, diagnosis in zip(runs, diagnoses, strict=True)
    ]


def ends(run: Run, metric: str) -> tuple[float, float]:
    """Means over the first and the last window of measured steps, of a short run over a third; nan without any."""
    values = run[metric][np.isfinite(run[metric])]
    if not len(values):
        return float("nan"), float("nan")
    width = max(1, min(window(run), len(values) // 3))
    return float(values[:width].mean()), float(values[-width:].mean())


def small_plot(run: Run, metric: str, finding: Finding | None = None) -> dict[str, Any] | None:
    """A curve as the path of an SVG of WIDTH x HEIGHT, and what of its width the finding spans; None without points.

    A long curve is drawn as its trend, or with a finding, whose evidence may be a spike, with its extremes.
    """
    if not run.has(metric):
        return None
    measured = np.isfinite(run[metric]) if is_sparse(metric) else np.full(len(run.steps), True)
    calm = trend(run.steps, run[metric]) if finding is None else None
    kept = thin_curve(run.steps[measured], run[metric][measured], most=150)
    steps, values = (calm["steps"], calm["values"]) if calm else kept
    drawn = np.array(values, dtype=np.float64)
    low, high = float(np.nanmin(drawn)), float(np.nanmax(drawn))
    first, last = int(run.steps[0]), int(run.steps[-1])

    def x(step: float) -> float:
        return WIDTH * (step - first) / max(last - first, 1)

    points = [None if v is None else (x(s), _height(v, low, high)) for s, v in zip(steps, values, strict=True)]
    span = None
    if finding is not None:
        begin, end = x(finding.first_step), x(last if finding.last_step is None else finding.last_step)
        span = (round(min(begin, WIDTH - 3), 1), round(max(end - begin, 3), 1))
    path = " ".join(_strokes(points))
    return {"path": path, "span": span, "low": format_value(low), "high": format_value(high), "steps": (first, last)}


def format_value(value: float | None) -> str:
    """Three significant digits, or a whole number whole."""
    if value is None or not np.isfinite(value):
        return "none"
    if value == 0:
        return "0"
    size = floor(log10(abs(value)))
    if not -4 <= size <= 5:
        text = f"{value:.2e}"
    elif value == int(value) or size >= 2:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.{2 - size}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def _main(run: Run) -> Iterator[tuple[str, str]]:
    known = labels(run)
    if run.stage == "train":
        held_out = [f"rewards/{name}" for name in run.held_out_scorers()]
        wanted = [MAIN[0], *held_out, *MAIN[1:], *CRITIC]
    else:
        wanted = [metric for metric in known if metric.startswith(f"{run.stage}/") and metric.endswith(LEARNING)]
    yield from ((metric, known[metric]) for metric in wanted if metric in known)


def _height(value: float, low: float, high: float) -> float:
    share = (value - low) / (high - low) if high > low else 0.5
    return 3 + (HEIGHT - 6) * (1 - share)


def _strokes(points: list[tuple[float, float] | None]) -> Iterator[str]:
    """A gap ends a stroke; a point alone is a stroke without length, which a round end makes visible."""
    before = None
    for place, point in enumerate(points):
        after = points[place + 1] if place + 1 < len(points) else None
        if point is not None:
            kind = "L" if before is not None else "M"
            dot = " h0" if before is None and after is None else ""
            yield f"{kind}{point[0]:.1f} {point[1]:.1f}{dot}"
        before = point
