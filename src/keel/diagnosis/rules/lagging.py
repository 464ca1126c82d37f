"""Do the critic's values lag behind the returns?"""

from collections.abc import Sequence

import numpy as np

from keel.diagnosis.advice import score_deviation
from keel.diagnosis.evidence import applicable_texts, change_evidence
from keel.diagnosis.findings import Cause, Change, Evidence
from keel.diagnosis.rule import (
    CRITICAL,
    TESTED_ON_SYNTHETIC_RUNS,
    WARNING,
    Bounds,
    Documentation,
    Levels,
    Rule,
    levels,
    rule_names,
    threshold,
)
from keel.diagnosis.rules.critic import LATE, LATE_STEPS, critic_rate, is_late_enough, value_lag
from keel.run.read.run import Run
from keel.run.read.series import Holds, at_least, at_most, last, shift_steps, trailing_mean, window

LAG = Bounds(warning=1.0, critical=3.0)  # deviations of the returns
EARLY_LAG = Bounds(warning=2.0, critical=3.0)  # the same where the values will not arrive by the end
HALFWAY = 0.5


def _will_not_catch_up(run: Run) -> Holds:
    """Whether the values, at the pace of the last window, cover less than half of the gap by the end of the run. [S]"""
    width = window(run)
    values, returns = (trailing_mean(run[f"critic/{name}"], width) for name in ("values", "returns"))
    pace = np.sign(returns - values) * (values - shift_steps(values, width)) / width
    progress = pace * np.maximum(run.planned - run.steps, 0)
    return (run.steps >= 2 * width) & at_most(progress, HALFWAY * np.abs(returns - values))


def _lagging_levels(run: Run) -> Levels:
    lag, is_late, is_hopeless = value_lag(run), is_late_enough(run), _will_not_catch_up(run)
    return levels(
        (at_least(lag, LAG.warning) & is_late | at_least(lag, EARLY_LAG.warning) & is_hopeless, WARNING),
        (at_least(lag, LAG.critical) & is_late | at_least(lag, EARLY_LAG.critical) & is_hopeless, CRITICAL),
    )


def _lagging_evidence(run: Run) -> Sequence[Evidence]:
    text = f"their mean is {last(value_lag(run)):.2g} deviations of the returns from the mean return"
    return [Evidence("critic/values", text), change_evidence(run, "critic/returns")]


def _lagging_causes(run: Run) -> Sequence[Cause]:
    mean, spread = abs(last(run["objective/shaped_scores"])), score_deviation(run)
    distance = f"their mean is {mean:.3g} from 0 and their deviation {spread:.3g}"
    rate = critic_rate(run)
    return [
        Cause(
            "the scores are far from 0, where a critic starts",
            applicable_texts((mean > 3 * spread, distance)),
            applicable_texts((mean < 2 * spread, distance)),
            Change("reward.normalize", "reference"),
        ),
        Cause(
            "the critic learns more slowly than the returns move",
            (f"its learning rate is {rate:.2g}",),
            (),
            Change("optim.critic_learning_rate", f"{3 * rate:.2g} (it is {rate:.2g})"),
        ),
    ]


# After the rules of the scores in the catalogue: a critic lags behind scores that rise for a wrong reason.
RULES = (
    Rule(
        "critic-lagging",
        "The critic's values lag behind the returns.",
        "critic",
        _lagging_levels,
        _lagging_evidence,
        _lagging_causes,
        Documentation(
            measure="lag = abs(mean of `critic/values` - mean of `critic/returns`) / `critic/returns_std`, over a "
            "window",
            thresholds=(
                threshold(f"lag, after {LATE:.0%} of the run and {LATE_STEPS} steps", LAG),
                threshold(
                    "lag, after two windows, if the values will cover less than half of it by the end", EARLY_LAG
                ),
            ),
            combine="Any row is enough.",
            note="The second row reports early, for example, scores of 500 with a deviation of 100 and a critic that "
            "starts at 0. The missing part of the values is assigned to the last tokens, and responses shrink.",
            source=TESTED_ON_SYNTHETIC_RUNS,
        ),
        follows=rule_names(
            "value-offset critic-not-learning reward-shift stale-normaliser updates-too-large policy-collapse "
            "updates-too-small learning-rate-schedule no-signal reward-hacking wrong-reference"
        ),
    ),
)
