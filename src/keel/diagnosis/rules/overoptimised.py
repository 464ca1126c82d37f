"""Is the run past the peak of a held-out scorer? Fits the form of Gao et al. 2022 to its gain over the KL."""

from collections.abc import Iterator, Sequence

import numpy as np

from keel.diagnosis.advice import raise_kl
from keel.diagnosis.evidence import change_evidence
from keel.diagnosis.findings import Cause, Change, Evidence
from keel.diagnosis.rule import (
    MEASURED_IN_ZOO,
    NOTICE,
    WARNING,
    Documentation,
    Levels,
    Rule,
    Threshold,
    levels,
    rule_names,
)
from keel.diagnosis.rules.hacking import fall_beyond_score
from keel.run.read.run import Run
from keel.run.read.series import at_least, last, start_mean, trailing_mean, window
from keel.stats.overoptimisation import OveroptimisationFit, fit_overoptimisation

NEAR, PAST = 0.8, 1.2  # of the peak's KL: near the peak, and certainly past it
NEAR_FALL, NEAR_ERRORS = 0.1, 3.0  # deviations and standard errors
PAST_FALL, PAST_ERRORS = 0.2, 4.0
FITS = 12  # in a run, evenly spaced: a fit at every step would add nothing
SHORTEST_DISTANCE = 0.5  # of sqrt(KL), over which a form can be fitted


def fit_curve(run: Run, name: str) -> OveroptimisationFit | None:
    """Fit the form to a held-out scorer's smoothed gain over the KL so far; None with too little data."""
    width = window(run)
    kl, score = trailing_mean(run["objective/kl"], width), trailing_mean(run[f"rewards/{name}"], width)
    gain = score - start_mean(run[f"rewards/{name}"], width)
    use = np.isfinite(kl) & np.isfinite(gain) & (kl > 0)
    use[: 2 * width] = False
    if use.sum() < 2 * width or np.ptp(np.sqrt(kl[use])) < SHORTEST_DISTANCE:
        return None
    return fit_overoptimisation(kl[use], gain[use])


def _fits(run: Run, name: str) -> Iterator[tuple[int, bool, bool]]:
    """Yield (index, whether the peak is near, whether it is past) at FITS steps of the run."""
    for index in range(run.planned // FITS, len(run.steps), max(1, run.planned // FITS)):
        part = run.until(int(run.steps[index]))
        fit, kl = fit_curve(part, name), last(trailing_mean(part["objective/kl"], window(part)))
        near, past = (fit is not None and fit.is_behind(kl / share) for share in (NEAR, PAST))
        yield int(index), near, past


def _peak_levels(run: Run) -> Levels:
    near, past = (np.zeros(len(run.steps), dtype=bool) for _ in range(2))
    for name in run.held_out_scorers() if run.has("objective/kl") else []:
        is_near, is_past = (np.zeros(len(run.steps), dtype=bool) for _ in range(2))
        for index, near_peak, past_peak in _fits(run, name):  # a result holds until the next fit
            is_near[index:], is_past[index:] = near_peak, past_peak
        # A peak counts only once the scorer itself has stopped rising.
        fall, errors = fall_beyond_score(run, name)
        near |= is_near & at_least(fall, NEAR_FALL) & at_least(errors, NEAR_ERRORS)
        past |= is_past & at_least(fall, PAST_FALL) & at_least(errors, PAST_ERRORS)
    return levels((near, NOTICE), (past, WARNING))


def _peak_evidence(run: Run) -> Sequence[Evidence]:
    fits = []
    kl = last(trailing_mean(run["objective/kl"], window(run)))
    for name in run.held_out_scorers():
        fit = fit_curve(run, name)
        if fit is not None and fit.is_behind(kl / NEAR):
            peak = "" if fit.peak_kl is None else f"peaks at {fit.peak_kl:.3g} nats, and "
            direction = "falls" if fit.is_behind(kl) else "rises"
            text = f"a fit of its gain over sqrt(KL) {peak}{direction} at the current KL, {kl:.3g} nats"
            fits.append(Evidence(f"rewards/{name}", text))
    return [*fits, change_evidence(run, "objective/kl"), change_evidence(run, "objective/scores")]


def _peak_causes(run: Run) -> Sequence[Cause]:
    return [
        Cause(
            "the policy exploits the reward model, as every policy does at a large enough KL",
            ("Gao et al. 2022 find the same form for models and data of many sizes",),
            (),
            raise_kl(run, 2),
        ),
        Cause(
            "the run is longer than the reward model supports",
            (),
            (),
            Change("steps", "stop at the checkpoint with the highest held-out score (keel evaluate --checkpoints)"),
        ),
    ]


RULES = (
    Rule(
        "over-optimisation",
        "A held-out scorer is past its peak and falls as the KL grows.",
        "reward model",
        _peak_levels,
        _peak_evidence,
        _peak_causes,
        Documentation(
            measure="gain of a held-out scorer = d (alpha - beta ln d), d = sqrt(`objective/kl`), with its peak at "
            f"d = exp(alpha / beta - 1); fitted {FITS} times in a run",
            thresholds=(
                Threshold(
                    "KL at which the fit falls",
                    notice=f"KL now / {NEAR:g}",
                    warning=f"KL now / {PAST:g}",
                ),
                Threshold(
                    "fall of the scorer from its best, beyond that of the score",
                    notice=f">= {NEAR_FALL:g} sd and {NEAR_ERRORS:g} se",
                    warning=f">= {PAST_FALL:g} sd and {PAST_ERRORS:g} se",
                ),
            ),
            combine="All rows must hold.",
            source="Gao et al. 2022; " + MEASURED_IN_ZOO,
        ),
        follows=rule_names(
            "reward-hacking updates-too-large reward-inverted policy-collapse entropy-runaway reward-shift "
            "sampler-mismatch length-exploitation prompts-repeated missing-ends wrong-reference kl-runaway"
        ),
    ),
)
