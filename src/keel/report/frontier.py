"""Score against KL: what runs are worth at each distance from their start, and whether others than the scorers they
learned from say so too."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keel.report.summary import format_value
from keel.run.read.compare import reward_kl_frontier
from keel.run.read.curves import round_value
from keel.run.read.run import Run
from keel.run.read.series import last, step_noise, window
from keel.stats.overoptimisation import Fit, fit_overoptimisation

SCORE = "score learned from"
SURE = 3.0
"""Standard errors that a change has to be, to be called one."""
PART = 0.25
"""Of what was gained, that has to be lost again for a peak to be behind the run: the highest of many may be chance."""
REACH = 4.0
"""A predicted peak that is further away than so many times the furthest KL is a guess."""
FITS = 0.7
"""Of the deviation of the scores: a form that leaves more of it, or has no highest point, is not drawn."""
DRAWN = 60


def panels(runs: Sequence[Run], names: Sequence[str]) -> list[dict[str, Any]]:
    """[{"label", "figure", "learned", "runs", "says"}]: the score first, then what was not learned from, by label.

    `runs` has for each run {"steps", "kl", "score", "peak", "form"} or None. `peak` is the place of the highest point,
    if the curve has fallen since by more than its noise; `form` is the fitted overoptimisation.Fit, drawn. `says` are
    sentences about what was not learned from, in which a run has its name if there are several.
    """
    found = [_by_label(reward_kl_frontier(run)) for run in runs]
    made = []
    for label in dict.fromkeys(label for own in found for label in own):
        lines = [own[label] | _shape(run, own[label], label) if label in own else None
                 for run, own in zip(runs, found, strict=True)]  # fmt: skip
        metric = next(line["figure"] for line in lines if line)
        told = [
            f"{name}: the {_describe(label, line, own[SCORE])}"
            if len(runs) > 1
            else f"The {_describe(label, line, own[SCORE])}"
            for name, line, own in zip(names, lines, found, strict=True)
            if line and label != SCORE
        ]
        made.append({"label": label, "figure": metric, "learned": label == SCORE, "runs": lines, "says": told})
    return made


def _by_label(points: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    own = {name: points[name] for name in ("figure", "steps", "kl", "score")}
    return {SCORE: own} | {part["label"]: part for part in points["others"]} if own["steps"] else {}


def _shape(run: Run, line: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Where it was highest, how sure a change of it is, and the form fitted to it; nothing of the score itself."""
    if label == SCORE:
        return {"peak": None, "noise": None, "form": None, "peak_kl": None}
    measured = np.isfinite(run[line["figure"]])
    width = 1 if line["figure"].startswith("evaluate/") else window(run)
    noise = last(step_noise(run[line["figure"]][measured])) * (2 / width) ** 0.5
    score = np.array(line["score"])
    place = int(score.argmax())
    fall = score[place] - score[-1]
    fitted = fit_overoptimisation(
        run["evaluate/kl" if line["figure"].startswith("evaluate/") else "objective/kl"], run[line["figure"]]
    )
    bends = fitted is not None and fitted.peak_kl is not None and fitted.residual < FITS * float(score.std())
    told = fitted if bends else None
    return {
        "peak": place if fall > SURE * noise and fall >= PART * (score[place] - score[0]) else None,
        "noise": round_value(noise),
        "form": _drawn(told, max(line["kl"])) if told else None,
        "peak_kl": _ahead(told, max(line["kl"])) if told else None,
    }


def _ahead(fitted: Fit, furthest: float) -> float | None:
    """The KL of a peak that has not been reached; None if there is none, or too far away to be more than a guess."""
    return fitted.peak_kl if fitted.peak_kl is not None and furthest < fitted.peak_kl < REACH * furthest else None


def _drawn(fitted: Fit, furthest: float) -> dict[str, Any]:
    kl = np.linspace(0, max(furthest, 0.0) ** 0.5, DRAWN) ** 2
    return {
        "kl": [round_value(value) for value in kl],
        "score": [round_value(fitted.predict(float(value))) for value in kl],
    }


def _describe(label: str, line: Mapping[str, Any], learned: Mapping[str, Any]) -> str:
    """What became of it, while the score learned from went its way."""
    first, end = line["score"][0], line["score"][-1]
    if line["peak"] is not None:
        step, kl, score = (line[name][line["peak"]] for name in ("steps", "kl", "score"))
        place = int(np.searchsorted(learned["steps"], step).clip(0, len(learned["steps"]) - 1))
        meanwhile = f"while the score learned from went from {format_value(learned['score'][place])}"
        where = f"at {format_value(kl)} nats (step {step})" if line["peak"] else f"in the beginning (step {step})"
        fell = f"{label} was highest, {format_value(score)}, {where} and has fallen to {format_value(end)}"
        return f"{fell}, {meanwhile} to {format_value(learned['score'][-1])}."
    if end - first <= SURE * (line["noise"] or np.inf):
        return f"{label} went from {format_value(first)} to {format_value(end)}, which is within its noise."
    ahead = (
        f"; the form that Gao et al. found puts it at {format_value(line['peak_kl'])} nats" if line["peak_kl"] else ""
    )
    return f"{label} rose from {format_value(first)} to {format_value(end)}; no peak is behind the run{ahead}."
