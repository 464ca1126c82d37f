"""Does the score rise only because the length of the responses changes?"""

from collections.abc import Sequence

import numpy as np

from keel.diagnosis.chance import RISE, RISE_ERRORS, SIGNIFICANT, score_rise
from keel.diagnosis.evidence import change_evidence, current_evidence
from keel.diagnosis.findings import Cause, Change, Evidence
from keel.diagnosis.rule import (
    CRITICAL,
    MEASURED_IN_ZOO,
    NOTICE,
    WARNING,
    Bounds,
    Documentation,
    Levels,
    Rule,
    Threshold,
    levels,
)
from keel.run.read.run import Run, Series
from keel.run.read.series import Holds, at_least, at_most, last, latch, rise, start_mean, trailing_mean, window

CHANGE = Bounds(warning=0.25, critical=0.6)  # of the initial length
CHANGE_DEVIATIONS = 0.5  # of the initial length's deviation
SHARE = Bounds(warning=0.5, critical=0.75)  # of the score's rise
LOW_SHARE, ORDER = 0.25, 0.7  # of the rise, with this rank correlation of score and length
BACK = 0.15  # of the initial length: the finding closes below this change
SHARED_RISE = 0.5  # of the score's rise, in deviations


def length_share(run: Run) -> Series:
    """Return the share of the score's rise that the change of length alone explains. [S]

    Rank correlation of score and length within a step * deviation of the score / deviation of the length * change of
    length / rise of the score.
    """
    width = window(run)
    correlation = trailing_mean(run["response/length_correlation"], 3 * width)
    slope = correlation * start_mean(run["objective/scores_std"], width)
    spread = start_mean(run["response/length_std"], width)
    gain = trailing_mean(run["objective/scores"], width) - start_mean(run["objective/scores"], width)
    with np.errstate(invalid="ignore", divide="ignore"):
        return slope / spread * rise(run, "response/length")[0] / gain


def _held_out_rises(run: Run) -> Holds:
    """Whether a held-out scorer rises at least half as far: the new length may really be better. [S]"""
    rises, gain = np.zeros(len(run.steps), dtype=bool), score_rise(run)[0]
    for name in run.held_out_scorers():
        held_out_gain, errors = score_rise(run, f"rewards/{name}")
        rises |= at_least(held_out_gain, SHARED_RISE * gain) & at_least(errors, RISE_ERRORS)
    return rises


def _length_levels(run: Run) -> Levels:
    width = window(run)
    gain, gain_errors = score_rise(run)
    change, change_errors = rise(run, "response/length")
    size = np.abs(change)
    initial, spread = start_mean(run["response/length"], width), start_mean(run["response/length_std"], width)
    share = length_share(run)
    has_changed = at_least(size, CHANGE.warning * initial) & at_least(size, CHANGE_DEVIATIONS * spread)
    has_changed &= at_least(np.abs(change_errors), SIGNIFICANT)
    # A scorer that counts words or letters rewards length too, although tokens explain less of its rise.
    order = trailing_mean(run["response/length_correlation"], 3 * width) * np.sign(change)
    explains = at_least(share, SHARE.warning) | (at_least(share, LOW_SHARE) & at_least(order, ORDER))
    is_exploit = has_changed & explains & at_least(gain, RISE) & at_least(gain_errors, SIGNIFICANT)
    is_severe = at_least(size, CHANGE.critical * initial) & at_least(share, SHARE.critical)
    # Latched, because responses of one length no longer show what changed their length.
    is_back = at_most(size, BACK * initial)
    is_unshared = ~_held_out_rises(run)
    return levels(
        (latch(is_exploit, is_back), NOTICE),
        (latch(is_exploit & is_unshared, is_back), WARNING),
        (latch(is_exploit & is_severe & is_unshared, is_back), CRITICAL),
    )


def _length_evidence(run: Run) -> Sequence[Evidence]:
    share = last(length_share(run))
    return [
        change_evidence(run, "response/length"),
        current_evidence(run, "response/length_correlation", "rank correlation of score and length within a step"),
        Evidence("objective/scores", f"the change of length alone explains {min(share, 1):.0%} of the rise"),
    ]


def _length_causes(run: Run) -> Sequence[Cause]:
    is_longer = rise(run, "response/length")[0][-1] > 0
    held_out = run.held_out_scorers()
    rising = [name for name in held_out if rise(run, f"rewards/{name}")[1][-1] > SIGNIFICANT]
    return [
        Cause(
            f"the scorer prefers {'longer' if is_longer else 'shorter'} responses",
            (f"within a step their rank correlation is {last(run['response/length_correlation']):.2f}",),
            (),
            Change("rewards", "a reward model that beats length on held-out pairs: see length in its report.html"),
        ),
        Cause(
            "better responses really have another length",
            tuple(f"the held-out scorer {name} rises too" for name in rising),
            tuple(f"the held-out scorer {name} does not rise" for name in held_out if name not in rising),
            Change("", "run keel evaluate, which reports the win rate corrected for length"),
        ),
    ]


RULES = (
    Rule(
        "length-exploitation",
        "The score rises mainly because the length of the responses changes.",
        "reward model",
        _length_levels,
        _length_evidence,
        _length_causes,
        Documentation(
            measure="share = rank correlation of score and length (`response/length_correlation`) * sd / "
            "`response/length_std` * change of `response/length` / rise of the score",
            thresholds=(
                Threshold(
                    "change of length, relative to the start's",
                    warning=f">= {CHANGE.warning:.0%}",
                    critical=f">= {CHANGE.critical:.0%}",
                ),
                Threshold(
                    "share of the score's rise",
                    warning=f">= {SHARE.warning:.0%}, or >= {LOW_SHARE:.0%} with a correlation >= {ORDER:g}",
                    critical=f">= {SHARE.critical:.0%}",
                ),
                Threshold(
                    "rise of the score",
                    warning=f">= {RISE:g} sd and {SIGNIFICANT:g} se",
                    critical=f">= {RISE:g} sd and {SIGNIFICANT:g} se",
                ),
            ),
            combine="All rows must hold.",
            note=f"The change must also be {CHANGE_DEVIATIONS:g} of the length's deviation and {SIGNIFICANT:g} se. "
            f"It is a notice where a held-out scorer rises by {SHARED_RISE:.0%} as many sd and "
            f"{RISE_ERRORS:g} se: another length may be better. A high correlation is that of a scorer that counts "
            f"words or letters. The finding closes when the length is within {BACK:.0%} of the start's.",
            source="Singhal et al. 2023 show how much of RLHF this can be; " + MEASURED_IN_ZOO,
        ),
        follows=("updates-too-large", "reward-shift", "value-offset"),
    ),
)
