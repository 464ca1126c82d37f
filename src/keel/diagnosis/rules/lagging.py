"""Does the critic run behind the returns?"""

from collections.abc import Sequence

import numpy as np

from keel.diagnosis.findings import Cause, Change, Evidence
from keel.diagnosis.rule import (
    CRITICAL,
    WARNING,
    Levels,
    Rule,
    applicable_texts,
    change_evidence,
    levels,
    names,
    score_deviation,
)
from keel.diagnosis.rules.critic import critic_rate, is_late_enough, lag
from keel.run.read.run import Run
from keel.run.read.series import Holds, at_least, at_most, last, shift_steps, trailing_mean, window


def _hopeless(run: Run) -> Holds:
    """Whether the mean value, at the pace of the last window, comes less than half of the way to the returns by the end
    of the run. [S]"""
    width = window(run)
    values, returns = (trailing_mean(run[f"critic/{name}"], width) for name in ("values", "returns"))
    pace = np.sign(returns - values) * (values - shift_steps(values, width)) / width
    way = pace * np.maximum(run.planned - run.steps, 0)
    return (run.steps >= 2 * width) & at_most(way, 0.5 * np.abs(returns - values))


def _lagging(run: Run) -> Levels:
    behind, late = lag(run), is_late_enough(run)
    return levels(
        (at_least(behind, 1.0) & late | at_least(behind, 2.0) & _hopeless(run), WARNING),
        (at_least(behind, 3.0) & (late | _hopeless(run)), CRITICAL),
    )


def _lagging_evidence(run: Run) -> Sequence[Evidence]:
    behind = last(lag(run))
    return [
        Evidence("critic/values", f"its mean is {behind:.2g} deviations of the returns away from theirs"),
        change_evidence(run, "critic/returns"),
    ]


def _lagging_causes(run: Run) -> Sequence[Cause]:
    mean, spread = abs(last(run["objective/shaped_scores"])), score_deviation(run)
    rate = critic_rate(run)
    return [
        Cause(
            "the scores are far from 0, where a critic begins",
            applicable_texts((mean > 3 * spread, f"{mean:.3g} from 0, where their deviation is {spread:.3g}")),
            applicable_texts((mean < 2 * spread, f"{mean:.3g} from 0, where their deviation is {spread:.3g}")),
            Change("reward.normalize", "reference"),
        ),
        Cause(
            "the critic learns more slowly than the returns move",
            (f"its learning rate is {rate:.2g}",),
            (),
            Change("optim.critic_learning_rate", f"{3 * rate:.2g} (it is {rate:.2g})"),
        ),
    ]


RULES = (
    Rule(
        "critic-lagging",
        "The critic runs behind the returns.",
        "critic",
        _lagging,
        _lagging_evidence,
        _lagging_causes,
        follows=names(
            "value-offset critic-not-learning reward-shift stale-normaliser updates-too-large policy-collapse "
            "updates-too-small learning-rate-schedule no-signal reward-hacking wrong-reference"
        ),
    ),
)
"""Looked at after the scores, which a critic runs behind when they rise for no good reason."""
