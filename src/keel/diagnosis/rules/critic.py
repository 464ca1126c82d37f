"""Does the critic predict the score of a response, and does that prediction reach its first tokens?"""

from collections.abc import Sequence

import numpy as np

from keel.diagnosis.evidence import applicable_texts, change_evidence, current_evidence, format_evidence
from keel.diagnosis.findings import Cause, Change, Evidence
from keel.diagnosis.rule import (
    CRITICAL,
    MEASURED_IN_ZOO,
    NOTICE,
    TESTED_ON_SYNTHETIC_RUNS,
    WARNING,
    Bounds,
    Documentation,
    Levels,
    Rule,
    Threshold,
    levels,
    levels_at_least,
    rule_names,
    threshold,
)
from keel.run.read.run import Run, Series
from keel.run.read.series import Holds, at_least, at_most, highest, last, start_mean, trailing_mean, window

LATE, LATE_STEPS = 0.3, 10  # of the run, and at least so many steps: a critic that learns predicts something by then
RETURNS_VARY = 0.25  # of their largest deviation
SHORTEST = 5  # steps for an explained variance
CONSTANT = 1e-5  # explained variance of values that differ only by rounding
ZERO_VALUES = 1e-4  # of the deviation of the returns
DEAD_AFTER = 4  # steps
EXPLAINED = Bounds(notice=0.03, warning=-0.25, critical=-1.0)
OFF_LAG = 0.5  # deviations of the returns
GROWTH = Bounds(warning=5.0, critical=20.0)  # times
EARLY_CREDIT, LATE_CREDIT = 0.1, 0.4  # rank correlations
HORIZONS = 3  # times 1 / (1 - gamma * gae_lambda)


def is_late_enough(run: Run) -> Holds:
    """Whether a critic that learns should predict something by this step. [S]"""
    return np.asarray(run.steps >= max(LATE_STEPS, LATE * run.planned))


def returns_vary(run: Run) -> Holds:
    """Whether the returns differ enough to evaluate a critic on them; not so when a task is solved. [S]"""
    spread = trailing_mean(run["critic/returns_std"], window(run))
    return at_least(spread, RETURNS_VARY * highest(spread))


def value_lag(run: Run) -> Series:
    """Return the distance of mean value and mean return over a window, in deviations of the returns. [S]"""
    values, returns, spread = (
        trailing_mean(run[f"critic/{name}"], window(run)) for name in ("values", "returns", "returns_std")
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.abs(values - returns) / np.maximum(spread, RETURNS_VARY * highest(spread))


def windowed_explained_variance(run: Run) -> Series:
    """Return the explained variance of at least 5 steps together. [S]

    The explained variance of a single step is unreliable where its returns are nearly equal.
    """
    width = max(window(run), SHORTEST)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        unexplained, total = (
            trailing_mean(run[f"critic/{name}_std"] ** 2, width) for name in ("advantages", "returns")
        )
        return np.where(total > 0, 1 - unexplained / total, np.nan)


def critic_rate(run: Run) -> float:
    """Return the critic's learning rate, by default three times the policy's."""
    return float(run.setting("optim.critic_learning_rate") or 3 * float(run.setting("optim.learning_rate", 0)))


def _not_learning_levels(run: Run) -> Levels:
    width = max(window(run), SHORTEST)
    explained = windowed_explained_variance(run)
    spread = trailing_mean(run["critic/returns_std"], width)
    # A value head starts at 0 or is centred on the returns. A dead critic gives all states the same value.
    is_dead = at_most(trailing_mean(np.abs(run["critic/values"]), width), ZERO_VALUES * spread)
    measured = trailing_mean((run["critic/returns_std"] > 0).astype(float), width)
    is_dead |= at_most(np.abs(explained), CONSTANT) & at_least(measured, 0.75)  # step 1 alone always has 0
    is_dead &= at_least(spread, 1e-12) & (run.steps >= DEAD_AFTER)
    is_checked = is_late_enough(run) & returns_vary(run)
    is_dull = at_most(explained, EXPLAINED.notice) & is_checked
    is_off = at_least(value_lag(run), OFF_LAG) | at_most(explained, EXPLAINED.warning)
    is_harmful = at_most(explained, EXPLAINED.critical) & is_checked
    return levels((is_dull, NOTICE), (is_dull & is_off, WARNING), (is_harmful | is_dead, CRITICAL))


def _not_learning_evidence(run: Run) -> Sequence[Evidence]:
    values, returns = format_evidence(last(run["critic/values"])), format_evidence(last(run["critic/returns"]))
    return [
        Evidence(
            "critic/explained_variance",
            f"{format_evidence(last(windowed_explained_variance(run)))} over the last steps; "
            "0 is no better than a constant, 1 is a perfect prediction",
        ),
        change_evidence(run, "loss/value"),
        Evidence("critic/values", f"mean {values}; the mean return is {returns}"),
    ]


def _not_learning_causes(run: Run) -> Sequence[Cause]:
    rate = critic_rate(run)
    policy_rate = float(run.setting("optim.learning_rate", 0) or np.nan)
    behind = last(value_lag(run))
    explained = last(windowed_explained_variance(run))
    values_differ, is_harmful = abs(explained) > 1e-3, explained < EXPLAINED.warning
    slow = Cause(
        "the critic learns too slowly",
        applicable_texts(
            (rate < policy_rate, f"its rate, {rate:.2g}, is below the policy's, {policy_rate:.2g}"),
            (not values_differ, "its values hardly differ between states"),
            (behind > OFF_LAG, f"its mean is {behind:.2g} deviations from the mean return"),
        ),
        applicable_texts((rate >= policy_rate and behind < 0.25 and values_differ, "its mean follows the returns")),
        Change("optim.critic_learning_rate", f"{3 * max(rate, policy_rate):.2g} (it is {rate:.2g})"),
    )
    fast = Cause(
        "the critic learns too fast, or from too few responses",
        applicable_texts((is_harmful, "it is worse than a constant")),
        applicable_texts((not is_harmful, "it is no worse than a constant")),
        Change("optim.critic_learning_rate", f"{0.3 * rate:.2g} (it is {rate:.2g})"),
    )
    noise = Cause(
        "the score of a response cannot be predicted from its first tokens",
        applicable_texts((behind < 0.25, "the mean value is right; only the differences are not predicted")),
        applicable_texts((not values_differ, "its values hardly differ between states")),
        Change("algorithm.name", "rloo, which needs no critic"),
    )
    return [fast, slow, noise] if is_harmful else [slow, noise, fast]


def _exploding_levels(run: Run) -> Levels:
    width = window(run)

    def growth(metric: str) -> Series:
        return trailing_mean(run[metric], 3) / start_mean(run[metric], width)

    with np.errstate(invalid="ignore", divide="ignore"):
        excess = growth("critic/advantages_std") / np.maximum(growth("objective/shaped_scores_std"), 1.0)
    return levels_at_least(excess, GROWTH)


def _exploding_evidence(run: Run) -> Sequence[Evidence]:
    return [
        change_evidence(run, "critic/advantages_std"),
        change_evidence(run, "objective/shaped_scores_std"),
        change_evidence(run, "critic/values"),
    ]


def _exploding_causes(run: Run) -> Sequence[Cause]:
    return [
        Cause(
            "the critic diverges: it learns from returns that contain its values",
            (f"gae_lambda is {run.setting('algorithm.gae_lambda')}; the lower it is, the more values they contain",),
            (),
            Change("optim.critic_learning_rate", "a third of the current value"),
        ),
        Cause(
            "nothing limits the change of a value in one step",
            applicable_texts((run.setting("algorithm.value_clip_range") is None, "value_clip_range is not set")),
            (),
            Change("algorithm.value_clip_range", f"{max(last(run['critic/returns_std']), 1e-3):.2g}"),
        ),
    ]


def _credit_levels(run: Run) -> Levels:
    width = 2 * window(run)
    early, late = (trailing_mean(run[f"credit/{end}"], width) for end in ("early", "late"))
    decay = float(run.setting("algorithm.gamma", 1.0)) * float(run.setting("algorithm.gae_lambda", 0.95))
    horizon = 1 / max(1 - decay, 1e-9)
    is_long = at_least(trailing_mean(run["response/length"], width), HORIZONS * horizon)
    is_settled = run.steps >= max(width, 0.1 * run.planned)
    return levels((at_most(early, EARLY_CREDIT) & at_least(late, LATE_CREDIT) & is_long & is_settled, WARNING))


def _credit_evidence(run: Run) -> Sequence[Evidence]:
    return [
        current_evidence(run, "credit/early", "correlation of a response's score and its first quarter's advantages"),
        current_evidence(run, "credit/late", "the same for its last quarter"),
        current_evidence(run, "response/length"),
    ]


def _credit_causes(run: Run) -> Sequence[Cause]:
    gae_lambda, explained = run.setting("algorithm.gae_lambda", 0.95), last(run["critic/explained_variance"])
    length = last(run["response/length"])
    return [
        Cause(
            "the score is on the last token only, and decays towards the first tokens",
            (f"gae_lambda is {gae_lambda}, and responses have {length:.0f} tokens",),
            applicable_texts((explained > 0.5, "the critic predicts the score well and carries it to the beginning")),
            Change("reward.segments", "sentence, so that each part is scored at its end"),
        ),
        Cause(
            "gae_lambda is too low for responses of this length",
            (f"{float(gae_lambda) ** length:.1g} of the score reaches the first token without the critic",),
            (),
            Change("algorithm.gae_lambda", f"1.0 (it is {gae_lambda})"),
        ),
    ]


RULES = (
    Rule(
        "critic-not-learning",
        "The critic predicts the returns no better than a constant.",
        "critic",
        _not_learning_levels,
        _not_learning_evidence,
        _not_learning_causes,
        Documentation(
            measure="explained variance = 1 - mean of `critic/advantages_std`^2 / mean of `critic/returns_std`^2, over "
            f"a window of at least {SHORTEST} steps",
            thresholds=(
                Threshold(
                    f"explained variance, after {LATE:.0%} of the run and {LATE_STEPS} steps",
                    notice=f"<= {EXPLAINED.notice:g}",
                    warning=f"<= {EXPLAINED.warning:g}, or <= {EXPLAINED.notice:g} and the mean value "
                    f">= {OFF_LAG:g} deviations from the mean return",
                    critical=f"<= {EXPLAINED.critical:g}",
                ),
                Threshold(
                    f"values, after {DEAD_AFTER} steps",
                    critical=f"all 0, or the same in all states (abs(explained variance) <= {CONSTANT:g})",
                ),
            ),
            combine="Any row is enough.",
            note="A low value is only a notice: some scores cannot be predicted, and a constant with the right mean "
            "does no harm. The first row is not checked where the deviation of the returns is below "
            f"{RETURNS_VARY:.0%} of its largest value, as when a task is solved.",
            source=MEASURED_IN_ZOO,
        ),
        follows=rule_names(
            "updates-too-large no-signal policy-collapse stale-normaliser reward-shift updates-too-small "
            "learning-rate-schedule prompts-repeated entropy-runaway kl-too-tight reward-failures value-offset"
        ),
    ),
    Rule(
        "advantages-exploding",
        "The advantages grow while the scores do not.",
        "critic",
        _exploding_levels,
        _exploding_evidence,
        _exploding_causes,
        Documentation(
            measure="growth of `critic/advantages_std` (before whitening) since the start / growth of "
            "`objective/shaped_scores_std`, the latter at least 1",
            thresholds=(threshold("ratio of the two", GROWTH),),
            source=TESTED_ON_SYNTHETIC_RUNS,
        ),
        follows=rule_names("updates-too-large reward-shift value-offset critic-not-learning entropy-runaway"),
    ),
    Rule(
        "credit-does-not-reach",
        "The score of a response does not reach its first tokens.",
        "critic",
        _credit_levels,
        _credit_evidence,
        _credit_causes,
        Documentation(
            measure="`credit/early`, `credit/late` and `response/length`, means over two windows; horizon = "
            "1 / (1 - gamma * gae_lambda) tokens",
            thresholds=(
                Threshold("`credit/early`", warning=f"<= {EARLY_CREDIT:g}"),
                Threshold("`credit/late`", warning=f">= {LATE_CREDIT:g}"),
                Threshold("`response/length`", warning=f">= {HORIZONS} horizons"),
            ),
            combine="All rows must hold.",
            source="the remedy, scores of segments: dense rewards of Wu et al. 2023; " + TESTED_ON_SYNTHETIC_RUNS,
        ),
        follows=("value-offset", "critic-not-learning", "no-signal", "stale-normaliser"),
    ),
)
