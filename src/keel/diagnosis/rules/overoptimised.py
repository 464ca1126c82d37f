"""Is the best of the run behind it? Gao et al.'s form, fitted to what a scorer says that is not learned from."""

from collections.abc import Iterator, Sequence

import numpy as np

from keel.diagnosis.findings import Cause, Change, Evidence
from keel.diagnosis.rule import NOTICE, WARNING, Levels, Rule, change_evidence, levels, names, raise_kl
from keel.diagnosis.rules.hacking import fall_alone
from keel.run.read.run import Run
from keel.run.read.series import at_least, last, start_mean, trailing_mean, window
from keel.stats.overoptimisation import Fit, fit_overoptimisation

NEAR, PAST = 0.8, 1.2  # of the peak's KL: time to think of stopping, and surely over it
FITS = 12  # looks in a whole run, evenly spaced: a fit of every step would say no more


def curve(run: Run, name: str) -> Fit | None:
    """The form fitted to a held-out scorer's gain over the KL so far, both smoothed; None with too little to go by."""
    width = window(run)
    kl, said = trailing_mean(run["objective/kl"], width), trailing_mean(run[f"rewards/{name}"], width)
    gain = said - start_mean(run[f"rewards/{name}"], width)
    use = np.isfinite(kl) & np.isfinite(gain) & (kl > 0)
    use[: 2 * width] = False
    if use.sum() < 2 * width or np.ptp(np.sqrt(kl[use])) < 0.5:
        return None
    return fit_overoptimisation(kl[use], gain[use])


def _seen(run: Run, name: str) -> Iterator[tuple[int, bool, bool]]:
    """(place, the peak is near, the peak is behind) at a few places of the run."""
    for place in range(run.planned // FITS, len(run.steps), max(1, run.planned // FITS)):
        part = run.until(int(run.steps[place]))
        found, kl = curve(part, name), last(trailing_mean(part["objective/kl"], window(part)))
        near, behind = (found is not None and found.is_behind(kl / share) for share in (NEAR, PAST))
        yield int(place), near, behind


def _levels(run: Run) -> Levels:
    near, behind = (np.zeros(len(run.steps), dtype=bool) for _ in range(2))
    for name in run.held_out_scorers() if run.has("objective/kl") else []:
        is_near, is_behind = (np.zeros(len(run.steps), dtype=bool) for _ in range(2))
        for place, nearly, quite in _seen(run, name):  # what was seen stands until the next look
            is_near[place:], is_behind[place:] = nearly, quite
        fall, errors = fall_alone(run, name)
        # No peak is believed before the scorer itself has stopped rising.
        near |= is_near & at_least(fall, 0.1) & at_least(errors, 3.0)
        behind |= is_behind & at_least(fall, 0.2) & at_least(errors, 4.0)
    return levels((near, NOTICE), (behind, WARNING))


def _evidence(run: Run) -> Sequence[Evidence]:
    found = []
    for name in run.held_out_scorers():
        form, kl = curve(run, name), last(trailing_mean(run["objective/kl"], window(run)))
        if form is not None:
            peak = "" if form.peak_kl is None else f"peaks at {form.peak_kl:.3g} nats, and "
            way = "falls" if form.is_behind(kl) else "rises"
            text = f"a fit of its gain over sqrt(KL) {peak}{way} where the policy is, at {kl:.3g} nats"
            found += [Evidence(f"rewards/{name}", text)] if form.is_behind(kl / NEAR) else []
    return [*found, change_evidence(run, "objective/kl"), change_evidence(run, "objective/scores")]


def _causes(run: Run) -> Sequence[Cause]:
    return [
        Cause(
            "every reward model is exploited in the end; this run went further than this one can bear",
            ("Gao et al. 2022 find the same form for models and data of many sizes",),
            (),
            raise_kl(run, 2),
        ),
        Cause(
            "the run is longer than the reward model is good for",
            (),
            (),
            Change(
                "steps", "stop at the checkpoint with the highest held-out score: keel evaluate --checkpoints shows it"
            ),
        ),
    ]


RULES = (
    Rule(
        "over-optimisation",
        "The best of the run is behind it: a scorer that is not learned from falls as the policy moves on.",
        "reward model",
        _levels,
        _evidence,
        _causes,
        follows=names(
            "reward-hacking updates-too-large reward-inverted policy-collapse entropy-runaway reward-shift "
            "sampler-mismatch length-exploitation prompts-repeated missing-ends wrong-reference kl-runaway"
        ),
    ),
)
