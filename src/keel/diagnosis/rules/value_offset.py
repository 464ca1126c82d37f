"""Is there a constant in the returns that the critic has not learned?"""

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
    format_evidence,
    levels,
    names,
)
from keel.diagnosis.rules.critic import critic_rate, lag, windowed_explained_variance
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

FAR = 3.0  # deviations of the returns that their mean is from 0: below that a constant does not dominate them
STALLED = 0.75  # of the gap is left after a window; a critic that learns with each step closes it by more


def _means(run: Run) -> tuple[Series, Series, Series]:
    """Mean value, mean return and deviation of the returns over a window; the deviation not below a quarter of its
    largest, as in `lag`. [S], [S], [S]"""
    values, returns, spread = (
        trailing_mean(run[f"critic/{name}"], window(run)) for name in ("values", "returns", "returns_std")
    )
    return values, returns, np.maximum(spread, 0.25 * highest(spread))


def _unlearned(run: Run) -> Holds:
    """Whether the returns are mostly a constant, of which the values are short, and no nearer than a window ago. [S]"""
    values, returns, spread = _means(run)
    short = (returns - values) * np.sign(returns)
    constant = at_least(np.abs(returns), FAR * spread) & at_most(windowed_explained_variance(run), 0.1)
    stalled = at_least(short, STALLED * shift_steps(short, window(run)))
    return constant & stalled & at_least(short, spread) & (policy_steps(run) >= 1)


def _offset(run: Run) -> Levels:
    unlearned = _unlearned(run)
    return levels((unlearned, WARNING), (unlearned & at_least(lag(run), 3.0), CRITICAL))


def _began(run: Run, place: int) -> int:
    """The first of the steps in a row, up to this one, whose mean value was a deviation from its mean return."""
    _, _, spread = _means(run)
    apart = at_least(np.abs(run["critic/values"] - run["critic/returns"]), spread)
    calm = np.flatnonzero(~apart[: place + 1])
    return min(int(calm[-1]) + 1, place) if len(calm) else 0


def _evidence(run: Run) -> Sequence[Evidence]:
    values, returns, spread = (last(each) for each in _means(run))
    return [
        Evidence(
            "critic/returns",
            f"their mean is {format_evidence(returns)} with a deviation of {format_evidence(spread)}: "
            "the score adds little to a constant",
        ),
        change_evidence(run, "critic/values"),
        Evidence(
            "critic/explained_variance", f"{format_evidence(last(windowed_explained_variance(run)))} of the last steps"
        ),
        Evidence(
            "critic/advantages_std",
            f"{format_evidence(last(run['critic/advantages_std']))}, "
            f"beside a mean advantage of {format_evidence(returns - values)}",
        ),
    ]


def _causes(run: Run) -> Sequence[Cause]:
    rate, normalised = critic_rate(run), str(run.setting("reward.normalize", "none"))
    policy_rate = float(run.setting("optim.learning_rate", 0) or np.nan)
    values, returns, spread = (last(each) for each in _means(run))
    return [
        Cause(
            "a constant in the score that a value head which begins at 0 has to learn first",
            (
                f"the mean return is {format_evidence(abs(returns) / spread)} deviations from 0",
                *applicable_texts((normalised == "none", "the scores are not centred")),
            ),
            applicable_texts((normalised != "none", f"reward.normalize is {normalised}")),
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
        "The critic has not learned a constant in the returns, which becomes a trend of the advantages over positions.",
        "critic",
        _offset,
        _evidence,
        _causes,
        follows=names(
            "reward-shift stale-normaliser reward-failures wrong-reference learning-rate-schedule updates-too-small "
            "no-signal policy-collapse"
        ),
        began=_began,
    ),
)
