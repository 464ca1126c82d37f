"""Do the returns have a constant offset that the critic has not learned?"""

from collections.abc import Sequence

import numpy as np

from keel.diagnosis.evidence import applicable_texts, change_evidence, format_evidence
from keel.diagnosis.findings import Cause, Change, Evidence
from keel.diagnosis.rule import (
    CRITICAL,
    TESTED_ON_SYNTHETIC_RUNS,
    WARNING,
    Bounds,
    Documentation,
    Levels,
    Rule,
    Threshold,
    levels,
    rule_names,
    threshold,
)
from keel.diagnosis.rules.critic import RETURNS_VARY, critic_rate, value_lag, windowed_explained_variance
from keel.run.read.run import Run, Series
from keel.run.read.series import (
    Holds,
    at_least,
    at_most,
    highest,
    last,
    policy_steps,
    shift_steps,
    trailing_mean,
    window,
)

FAR = 3.0  # deviations of the returns: below that, their mean does not dominate them
SHORT = Bounds(warning=1.0, critical=3.0)  # deviations of the returns by which the values fall short
STALLED = 0.75  # of the gap remains after a window; a critic that learns with each step closes it faster
EXPLAINED = 0.1  # explained variance


def _means(run: Run) -> tuple[Series, Series, Series]:
    """Return mean value, mean return and deviation of the returns over a window. [S], [S], [S]

    The deviation is at least a quarter of its largest value, as in `value_lag`.
    """
    values, returns, spread = (
        trailing_mean(run[f"critic/{name}"], window(run)) for name in ("values", "returns", "returns_std")
    )
    return values, returns, np.maximum(spread, RETURNS_VARY * highest(spread))


def _has_unlearned_offset(run: Run) -> Holds:
    """Whether the returns are mostly a constant that the values miss, and the gap hardly shrank in a window. [S]"""
    values, returns, spread = _means(run)
    gap = (returns - values) * np.sign(returns)
    is_constant = at_least(np.abs(returns), FAR * spread) & at_most(windowed_explained_variance(run), EXPLAINED)
    is_stalled = at_least(gap, STALLED * shift_steps(gap, window(run)))
    return is_constant & is_stalled & at_least(gap, SHORT.warning * spread) & (policy_steps(run) >= 1)


def _offset_levels(run: Run) -> Levels:
    has_offset = _has_unlearned_offset(run)
    return levels((has_offset, WARNING), (has_offset & at_least(value_lag(run), SHORT.critical), CRITICAL))


def _find_offset_start(run: Run, index: int) -> int:
    """Return the first index since which the mean value has always been a deviation from the mean return."""
    _, _, spread = _means(run)
    is_off = at_least(np.abs(run["critic/values"] - run["critic/returns"]), spread)
    calm = np.flatnonzero(~is_off[: index + 1])
    return min(int(calm[-1]) + 1, index) if len(calm) else 0


def _offset_evidence(run: Run) -> Sequence[Evidence]:
    values, returns, spread = (last(each) for each in _means(run))
    explained, advantages = last(windowed_explained_variance(run)), last(run["critic/advantages_std"])
    return [
        Evidence(
            "critic/returns",
            f"mean {format_evidence(returns)}, deviation {format_evidence(spread)}: mostly a constant",
        ),
        change_evidence(run, "critic/values"),
        Evidence("critic/explained_variance", f"{format_evidence(explained)} over the last steps"),
        Evidence(
            "critic/advantages_std",
            f"{format_evidence(advantages)}; the mean advantage is {format_evidence(returns - values)}",
        ),
    ]


def _offset_causes(run: Run) -> Sequence[Cause]:
    rate, normalize = critic_rate(run), str(run.setting("reward.normalize", "none"))
    policy_rate = float(run.setting("optim.learning_rate", 0) or np.nan)
    values, returns, spread = (last(each) for each in _means(run))
    return [
        Cause(
            "the scores have a constant offset, which a value head that starts at 0 has to learn first",
            (
                f"the mean return is {format_evidence(abs(returns) / spread)} deviations from 0",
                *applicable_texts((normalize == "none", "the scores are not centred")),
            ),
            applicable_texts((normalize != "none", f"reward.normalize is {normalize}")),
            Change("reward.normalize", "reference (or set the value head's bias to the mean return)"),
        ),
        Cause(
            "the critic learns too slowly",
            applicable_texts(
                (rate <= policy_rate, f"its rate, {rate:.2g}, is not above the policy's, {policy_rate:.2g}"),
                (abs(values) < 0.1 * spread, "its values have hardly moved"),
            ),
            (),
            Change("optim.critic_learning_rate", f"{3 * max(rate, policy_rate):.2g} (it is {rate:.2g})"),
        ),
    ]


RULES = (
    Rule(
        "value-offset",
        "The critic has not learned a constant offset of the returns, which gives the advantages a trend over "
        "positions.",
        "critic",
        _offset_levels,
        _offset_evidence,
        _offset_causes,
        Documentation(
            measure="`critic/values` and `critic/returns`, means over a window, in deviations of the returns "
            "(`critic/returns_std`); explained variance as in `critic-not-learning`",
            thresholds=(
                Threshold("abs(mean return), in deviations", warning=f">= {FAR:g}", critical=f">= {FAR:g}"),
                threshold("gap of the mean value to it, in deviations", SHORT),
                Threshold("explained variance", warning=f"<= {EXPLAINED:g}", critical=f"<= {EXPLAINED:g}"),
                Threshold(
                    "gap, relative to that of a window ago", warning=f">= {STALLED:.0%}", critical=f">= {STALLED:.0%}"
                ),
            ),
            combine="All rows must hold.",
            note="GAE with lambda < 1 assigns the missing part of the values to the last tokens, where it hides the "
            "score. The finding starts at the step in which the values first lagged. Not reported: a critic that is a "
            "few steps late at the start, and one in its warm-up. It occurs in runs of other trainers and of earlier "
            "versions of keel, whose value head started at 0.",
            source=TESTED_ON_SYNTHETIC_RUNS,
        ),
        follows=rule_names(
            "reward-shift stale-normaliser reward-failures wrong-reference learning-rate-schedule updates-too-small "
            "no-signal policy-collapse"
        ),
        find_start=_find_offset_start,
    ),
)
