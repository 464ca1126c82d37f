"""Does the critic foresee what an answer will be worth, and does that reach the tokens that earned it?"""

from collections.abc import Sequence

import numpy as np

from keel.diagnosis.findings import Cause, Change, Evidence
from keel.diagnosis.rule import (
    CRITICAL,
    NOTICE,
    WARNING,
    Levels,
    Rule,
    applicable_texts,
    change_evidence,
    format_evidence,
    is_now,
    levels,
    names,
)
from keel.run.read.run import Run, Series
from keel.run.read.series import Holds, at_least, at_most, highest, last, start_mean, trailing_mean, window

CONSTANT = 1e-5  # explained variance of values that differ by nothing but rounding


def is_late_enough(run: Run) -> Holds:
    """Steps by which a critic that learns should know something: three tenths of the run, at least 10."""
    return np.asarray(run.steps >= max(10, 0.3 * run.planned))


def varies(run: Run) -> Holds:
    """Whether returns still differ enough for a critic to be judged by them: not so when a task is solved. [S]"""
    spread = trailing_mean(run["critic/returns_std"], window(run))
    return at_least(spread, 0.25 * highest(spread))


def lag(run: Run) -> Series:
    """How far the mean value is from the mean return over a window, in deviations of the returns. [S]"""
    values, returns, spread = (
        trailing_mean(run[f"critic/{name}"], window(run)) for name in ("values", "returns", "returns_std")
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.abs(values - returns) / np.maximum(spread, 0.25 * highest(spread))


def windowed_explained_variance(run: Run) -> Series:
    """Over a window of at least 5 steps together: that of a single one is wild where its returns are alike. [S]"""
    width = max(window(run), 5)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        left, whole = (trailing_mean(run[f"critic/{name}_std"] ** 2, width) for name in ("advantages", "returns"))
        return np.where(whole > 0, 1 - left / whole, np.nan)


def critic_rate(run: Run) -> float:
    """The critic's learning rate, by default three times the policy's."""
    return float(run.setting("optim.critic_learning_rate") or 3 * float(run.setting("optim.learning_rate", 0)))


def _not_learning(run: Run) -> Levels:
    width = max(window(run), 5)
    explained = windowed_explained_variance(run)
    spread = trailing_mean(run["critic/returns_std"], width)
    # A value head may begin at 0 or be centred on the returns: what is dead has one value for all states.
    silent = at_most(trailing_mean(np.abs(run["critic/values"]), width), 1e-4 * spread)
    known = trailing_mean((run["critic/returns_std"] > 0).astype(float), width)
    silent |= at_most(np.abs(explained), CONSTANT) & at_least(known, 0.75)  # the first step alone is always 0
    silent &= at_least(spread, 1e-12) & (run.steps >= 4)
    dull = at_most(explained, 0.03) & is_late_enough(run) & varies(run)
    off = at_least(lag(run), 0.5) | at_most(explained, -0.25)
    worse = at_most(explained, -1.0) & is_late_enough(run) & varies(run)
    return levels((dull, NOTICE), (dull & off, WARNING), (worse | silent, CRITICAL))


def _not_learning_evidence(run: Run) -> Sequence[Evidence]:
    return [
        Evidence(
            "critic/explained_variance",
            f"{format_evidence(last(windowed_explained_variance(run)))} of the last steps; "
            "0 is no better than a constant, 1 is all of it",
        ),
        change_evidence(run, "loss/value"),
        Evidence(
            "critic/values",
            f"{format_evidence(last(run['critic/values']))}, "
            f"where the returns are {format_evidence(last(run['critic/returns']))} on average",
        ),
    ]


def _not_learning_causes(run: Run) -> Sequence[Cause]:
    rate = critic_rate(run)
    policy_rate = float(run.setting("optim.learning_rate", 0) or np.nan)
    behind = last(lag(run))
    moves = abs(last(windowed_explained_variance(run))) > 1e-3
    worse = last(windowed_explained_variance(run)) < -0.25
    slow = Cause(
        "the critic learns too slowly",
        applicable_texts(
            (rate < policy_rate, f"its rate, {rate:.2g}, is below the policy's, {policy_rate:.2g}"),
            (not moves, "its values hardly differ between states"),
            (behind > 0.5, f"its mean is {behind:.2g} deviations from the returns'"),
        ),
        applicable_texts((rate >= policy_rate and behind < 0.25 and moves, "its mean follows the returns")),
        Change("optim.critic_learning_rate", f"{3 * max(rate, policy_rate):.2g} (it is {rate:.2g})"),
    )
    wild = Cause(
        "the critic learns too fast, or from too few answers",
        applicable_texts((worse, "it is worse than a constant")),
        applicable_texts((not worse, "it is no worse than a constant")),
        Change("optim.critic_learning_rate", f"{0.3 * rate:.2g} (it is {rate:.2g})"),
    )
    noise = Cause(
        "what an answer is worth cannot be foreseen from its beginning",
        applicable_texts((behind < 0.25, "the mean value is right, only the differences are not foreseen")),
        applicable_texts((not moves, "its values hardly differ between states")),
        Change("algorithm.name", "rloo, which needs no critic"),
    )
    return [wild, slow, noise] if worse else [slow, noise, wild]


def _exploding(run: Run) -> Levels:
    width = window(run)
    size, begun = trailing_mean(run["critic/advantages_std"], 3), start_mean(run["critic/advantages_std"], width)
    scores, before = (
        trailing_mean(run["objective/shaped_scores_std"], 3),
        start_mean(run["objective/shaped_scores_std"], width),
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        growth = size / begun / np.maximum(scores / before, 1.0)
    return levels((at_least(growth, 5.0), WARNING), (at_least(growth, 20.0), CRITICAL))


def _exploding_evidence(run: Run) -> Sequence[Evidence]:
    return [
        change_evidence(run, "critic/advantages_std"),
        change_evidence(run, "objective/shaped_scores_std"),
        change_evidence(run, "critic/values"),
    ]


def _exploding_causes(run: Run) -> Sequence[Cause]:
    return [
        Cause(
            "the critic runs away: its own values make the returns that it learns from",
            (f"gae_lambda is {run.setting('algorithm.gae_lambda')}: the lower, the more returns are made of values",),
            (),
            Change("optim.critic_learning_rate", "a third of what it is"),
        ),
        Cause(
            "nothing limits how far a value may move in one step",
            applicable_texts((run.setting("algorithm.value_clip_range") is None, "value_clip_range is not set")),
            (),
            Change("algorithm.value_clip_range", f"{max(last(run['critic/returns_std']), 1e-3):.2g}"),
        ),
    ]


def _credit(run: Run) -> Levels:
    width = 2 * window(run)
    early, late = (trailing_mean(run[f"credit/{end}"], width) for end in ("early", "late"))
    horizon = 1 / max(
        1 - float(run.setting("algorithm.gamma", 1.0)) * float(run.setting("algorithm.gae_lambda", 0.95)), 1e-9
    )
    long = at_least(trailing_mean(run["response/length"], width), 3 * horizon)
    settled = run.steps >= max(width, 0.1 * run.planned)
    return levels((at_most(early, 0.1) & at_least(late, 0.4) & long & settled, WARNING))


def _credit_evidence(run: Run) -> Sequence[Evidence]:
    return [
        is_now(run, "credit/early", "correlation of an answer's score and the advantage of its first quarter"),
        is_now(run, "credit/late", "the same of its last quarter"),
        is_now(run, "response/length"),
    ]


def _credit_causes(run: Run) -> Sequence[Cause]:
    gae_lambda, explained = run.setting("algorithm.gae_lambda", 0.95), last(run["critic/explained_variance"])
    return [
        Cause(
            "the score stands on the last token alone, and fades on its way back",
            (f"gae_lambda is {gae_lambda}, and answers have {last(run['response/length']):.0f} tokens",),
            applicable_texts((explained > 0.5, "the critic foresees the score well, and carries it")),
            Change("reward.segments", "sentence, so that each part is paid where it ends"),
        ),
        Cause(
            "gae_lambda is too low for answers of this length",
            (f"{float(gae_lambda) ** last(run['response/length']):.1g} of it reaches the first token by itself",),
            (),
            Change("algorithm.gae_lambda", f"1.0 (it is {gae_lambda})"),
        ),
    ]


RULES = (
    Rule(
        "critic-not-learning",
        "The critic foresees the returns no better than a constant would.",
        "critic",
        _not_learning,
        _not_learning_evidence,
        _not_learning_causes,
        follows=names(
            "updates-too-large no-signal policy-collapse stale-normaliser reward-shift updates-too-small "
            "learning-rate-schedule prompts-repeated entropy-runaway kl-too-tight reward-failures value-offset"
        ),
    ),
    Rule(
        "advantages-exploding",
        "The advantages grow without the scores.",
        "critic",
        _exploding,
        _exploding_evidence,
        _exploding_causes,
        follows=names("updates-too-large reward-shift value-offset critic-not-learning entropy-runaway"),
    ),
    Rule(
        "credit-does-not-reach",
        "What an answer is worth does not reach the tokens that began it.",
        "critic",
        _credit,
        _credit_evidence,
        _credit_causes,
        follows=("value-offset", "critic-not-learning", "no-signal", "stale-normaliser"),
    ),
)
