"""Is the score's rise only a change of length?"""

from collections.abc import Sequence

import numpy as np

from keel.diagnosis.chance import SURE, score_rise
from keel.diagnosis.findings import Cause, Change, Evidence
from keel.diagnosis.rule import CRITICAL, NOTICE, WARNING, Levels, Rule, change_evidence, is_now, levels
from keel.run.read.run import Run, Series
from keel.run.read.series import Holds, at_least, at_most, last, latch, rise, start_mean, trailing_mean, window


def length_share(run: Run) -> Series:
    """Which part of the score's rise a change of length alone would bring, by how score and length go together within
    a step. [S]"""
    width = window(run)
    slope = trailing_mean(run["response/length_correlation"], 3 * width) * start_mean(
        run["objective/scores_std"], width
    )
    spread = start_mean(run["response/length_std"], width)
    gain = trailing_mean(run["objective/scores"], width) - start_mean(run["objective/scores"], width)
    with np.errstate(invalid="ignore", divide="ignore"):
        return slope / spread * rise(run, "response/length")[0] / gain


def _earned(run: Run) -> Holds:
    """Whether a held-out scorer rises too, at least half as far: another length may really be better. [S]"""
    found, gain = np.zeros(len(run.steps), dtype=bool), score_rise(run)[0]
    for name in run.held_out_scorers():
        theirs, errors = score_rise(run, f"rewards/{name}")
        found |= at_least(theirs, 0.5 * gain) & at_least(errors, 2.0)
    return found


def _length(run: Run) -> Levels:
    width = window(run)
    gain, errors = score_rise(run)
    change, sure = rise(run, "response/length")
    before = start_mean(run["response/length"], width)
    share = length_share(run)
    spread = start_mean(run["response/length_std"], width)
    much = (
        at_least(np.abs(change), 0.25 * before) & at_least(np.abs(change), 0.5 * spread) & at_least(np.abs(sure), SURE)
    )
    # A scorer of words or letters is one of length too, though the tokens explain less of its rise.
    order = trailing_mean(run["response/length_correlation"], 3 * width) * np.sign(change)
    mostly = at_least(share, 0.5) | (at_least(share, 0.25) & at_least(order, 0.7))
    paid = mostly & at_least(gain, 0.25) & at_least(errors, SURE)
    severe = at_least(np.abs(change), 0.6 * before) & at_least(share, 0.75)
    back = at_most(np.abs(change), 0.15 * before)  # answers of one length no longer show what lengthened them
    return levels(
        (latch(much & paid, back), NOTICE),
        (latch(much & paid & ~_earned(run), back), WARNING),
        (latch(much & paid & severe & ~_earned(run), back), CRITICAL),
    )


def _length_evidence(run: Run) -> Sequence[Evidence]:
    share = last(length_share(run))
    return [
        change_evidence(run, "response/length"),
        is_now(run, "response/length_correlation", "rank correlation of score and length within a step"),
        Evidence("objective/scores", f"{min(share, 1):.0%} of the rise is what the change of length alone would bring"),
    ]


def _length_causes(run: Run) -> Sequence[Cause]:
    longer = rise(run, "response/length")[0][-1] > 0
    held_out = run.held_out_scorers()
    rising = [name for name in held_out if rise(run, f"rewards/{name}")[1][-1] > SURE]
    return [
        Cause(
            f"the scorer pays for {'longer' if longer else 'shorter'} answers",
            (f"within a step their rank correlation is {last(run['response/length_correlation']):.2f}",),
            (),
            Change("rewards", "a reward model that beats length on held-out pairs: see length in its report.html"),
        ),
        Cause(
            "better answers are really of another length",
            tuple(f"the held-out scorer {name} rises as well" for name in rising),
            tuple(f"the held-out scorer {name} does not rise" for name in held_out if name not in rising),
            Change("", "judge it: keel evaluate gives the win rate with length taken out"),
        ),
    ]


RULES = (
    Rule(
        "length-exploitation",
        "The score rises because the answers change their length, and little else.",
        "reward model",
        _length,
        _length_evidence,
        _length_causes,
        follows=("updates-too-large", "reward-shift", "value-offset"),
    ),
)
