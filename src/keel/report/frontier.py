"""Scores against the KL to the reference: those that were learned from, and held-out scores for comparison."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keel.report.summary import format_value
from keel.run.read.compare import reward_kl_frontier
from keel.run.read.curves import round_value
from keel.run.read.run import Run
from keel.run.read.series import last, step_noise, window
from keel.stats.overoptimisation import OveroptimisationFit, fit_overoptimisation

SCORE = "score learned from"
MIN_STANDARD_ERRORS = 3.0
"""A change of less is reported as noise."""
MIN_LOST_SHARE = 0.25
"""Share of the gain that must be lost again before a peak is reported. The highest of many points may be chance."""
MAX_PEAK_DISTANCE = 4.0
"""A predicted peak at more than this many times the largest KL is not reported, because it is a guess."""
MAX_RESIDUAL_SHARE = 0.7
"""Largest residual of a fitted curve that is drawn, as a share of the standard deviation of the scores."""
CURVE_POINTS = 60


def panels(runs: Sequence[Run], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the panels of the plot: the score that was learned from first, then held-out scores by label.

    Args:
        runs: The runs to draw.
        names: Their names, which begin the sentences if there are several.

    Returns:
        [{"label", "figure", "learned", "runs", "says"}]. `runs` holds for each run {"steps", "kl", "score", "peak",
        "form"}, or None. `peak` is the index of the highest point, if the curve has fallen since by more than its
        noise. `form` is the drawn fit of `fit_overoptimisation`. `says` holds sentences about held-out scores.
    """
    by_run = [_points_by_label(reward_kl_frontier(run)) for run in runs]
    panels_by_label = []
    for label in dict.fromkeys(label for points in by_run for label in points):
        lines = [
            points[label] | _peak_and_fit(run, points[label], label) if label in points else None
            for run, points in zip(runs, by_run, strict=True)
        ]
        metric = next(line["figure"] for line in lines if line)
        sentences = [
            f"{name}: the {_describe(label, line, points[SCORE])}"
            if len(runs) > 1
            else f"The {_describe(label, line, points[SCORE])}"
            for name, line, points in zip(names, lines, by_run, strict=True)
            if line and label != SCORE
        ]
        panels_by_label.append(
            {"label": label, "figure": metric, "learned": label == SCORE, "runs": lines, "says": sentences}
        )
    return panels_by_label


def _points_by_label(points: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    learned = {name: points[name] for name in ("figure", "steps", "kl", "score")}
    return {SCORE: learned} | {other["label"]: other for other in points["others"]} if learned["steps"] else {}


def _peak_and_fit(run: Run, line: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Return the peak of a held-out score, its noise and the fitted curve. All are None for the score learned from."""
    if label == SCORE:
        return {"peak": None, "noise": None, "form": None, "peak_kl": None}
    measured = np.isfinite(run[line["figure"]])
    is_evaluation = line["figure"].startswith("evaluate/")
    width = 1 if is_evaluation else window(run)
    noise = last(step_noise(run[line["figure"]][measured])) * (2 / width) ** 0.5  # of a difference of two means
    score = np.array(line["score"])
    highest = int(score.argmax())
    fall = score[highest] - score[-1]
    fit = fit_overoptimisation(run["evaluate/kl" if is_evaluation else "objective/kl"], run[line["figure"]])
    # A fit that leaves most of the deviation unexplained, or has no maximum, is not drawn.
    is_drawn = fit is not None and fit.peak_kl is not None and fit.residual < MAX_RESIDUAL_SHARE * float(score.std())
    drawn_fit = fit if is_drawn else None
    has_peak = fall > MIN_STANDARD_ERRORS * noise and fall >= MIN_LOST_SHARE * (score[highest] - score[0])
    return {
        "peak": highest if has_peak else None,
        "noise": round_value(noise),
        "form": _curve_points(drawn_fit, max(line["kl"])) if drawn_fit else None,
        "peak_kl": _predicted_peak(drawn_fit, max(line["kl"])) if drawn_fit else None,
    }


def _predicted_peak(fit: OveroptimisationFit, max_kl: float) -> float | None:
    """Return the KL of a peak that the run has not reached; None if there is none, or it is too far away."""
    return fit.peak_kl if fit.peak_kl is not None and max_kl < fit.peak_kl < MAX_PEAK_DISTANCE * max_kl else None


def _curve_points(fit: OveroptimisationFit, max_kl: float) -> dict[str, Any]:
    kl = np.linspace(0, max(max_kl, 0.0) ** 0.5, CURVE_POINTS) ** 2
    return {
        "kl": [round_value(value) for value in kl],
        "score": [round_value(fit.predict(float(value))) for value in kl],
    }


def _describe(label: str, line: Mapping[str, Any], learned: Mapping[str, Any]) -> str:
    """Describe the course of a held-out score, and in case of a peak, of the score learned from meanwhile."""
    start, end = line["score"][0], line["score"][-1]
    if line["peak"] is not None:
        step, kl, score = (line[name][line["peak"]] for name in ("steps", "kl", "score"))
        index = int(np.searchsorted(learned["steps"], step).clip(0, len(learned["steps"]) - 1))
        meanwhile = f"while the score learned from went from {format_value(learned['score'][index])}"
        where = f"at {format_value(kl)} nats (step {step})" if line["peak"] else f"in the beginning (step {step})"
        fell = f"{label} was highest, {format_value(score)}, {where} and has fallen to {format_value(end)}"
        return f"{fell}, {meanwhile} to {format_value(learned['score'][-1])}."
    if end - start <= MIN_STANDARD_ERRORS * (line["noise"] or np.inf):
        return f"{label} went from {format_value(start)} to {format_value(end)}, which is within its noise."
    predicted = (
        f"; the curve of Gao et al. (2022) predicts it at {format_value(line['peak_kl'])} nats"
        if line["peak_kl"]
        else ""
    )
    return f"{label} rose from {format_value(start)} to {format_value(end)}; no peak so far{predicted}."
