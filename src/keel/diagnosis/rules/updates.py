"""Does each update move the policy far enough to learn, and no further than it can bear?"""

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
    is_failure,
    is_now,
    levels,
    names,
    scale_setting,
)
from keel.run.read.run import Run, Series
from keel.run.read.series import (
    at_least,
    at_most,
    first,
    highest,
    last,
    policy_steps,
    trailing_mean,
    trailing_median,
    window,
)


def _large(run: Run) -> Levels:
    # Estimates of a KL have heavy tails: one wild token makes a step look large, so the middle one of several speaks.
    jump, drift, clipped = (
        trailing_median(run[name], 5) for name in ("policy/step_kl", "policy/approx_kl", "policy/clipfrac")
    )
    mild = at_least(jump, 0.2) | at_least(drift, 0.2) | at_least(clipped, 0.3)
    grave = at_least(jump, 0.5) | at_least(drift, 0.5) | at_least(clipped, 0.5)
    return levels((mild, WARNING), (grave, CRITICAL))


def _large_evidence(run: Run) -> Sequence[Evidence]:
    worst = format_evidence(last(highest(run["policy/step_kl"])))
    return [
        Evidence("policy/step_kl", f"up to {worst} nats a token moved in one step; below 0.05 is calm"),
        is_now(run, "policy/approx_kl", "mean over the epochs of a step"),
        is_now(run, "policy/clipfrac", "share of tokens that the clip stopped; below 0.2 is calm"),
    ]


def _large_causes(run: Run) -> Sequence[Cause]:
    epochs = float(run.setting("algorithm.update_epochs", 1))
    norm, limit = last(run["policy/grad_norm"]), float(run.setting("optim.max_grad_norm", 1.0) or np.nan)
    clipping = last(trailing_mean(run["policy/clipfrac"], 3)) > 0.3
    jump = last(highest(trailing_median(run["policy/step_kl"], 5)))
    peak = run.setting("optim.learning_rate", np.nan)
    rate = Cause(
        "the learning rate is too high",
        applicable_texts(
            (jump > 0.2, f"at a rate of {peak:g} a step moves {jump:.2g} nats a token"),
            (norm > limit, f"the gradient's norm, {norm:.2g}, is cut to {limit:g}: the rate alone sets the step"),
        ),
        (),
        scale_setting(run, "optim.learning_rate", 0.2),
    )
    often = Cause(
        "each batch is used too often",
        (f"update_epochs is {epochs:g}",),
        applicable_texts((not clipping, "few tokens are clipped")),
        Change("algorithm.update_epochs", f"{max(1, round(min(epochs / 4, 4)))} (it is {epochs:g})"),
    )
    stop = Cause(
        "nothing ends a step's epochs when the policy has moved far enough",
        applicable_texts((run.setting("algorithm.max_approx_kl") is None, "max_approx_kl is not set")),
        (),
        Change("algorithm.max_approx_kl", "0.05"),
    )
    order = [often, rate] if epochs > 8 else [rate, often] if epochs > 1 else [rate]
    return [*order, stop] if epochs > 1 and run.setting("algorithm.max_approx_kl") is None else order


def path(run: Run) -> Series:
    """How many deviations of the score the updates so far could have moved its mean at most: the sum over steps of
    sqrt(2 KL), KL in nats per answer (the bound of `reward-shift`, taken the other way round). [S]"""
    nats = np.maximum(run["policy/step_kl"], 0) * run["response/length"]
    return np.asarray(np.nancumsum(np.sqrt(2 * nats)))


def reach(run: Run) -> Series:
    """How many deviations the whole run could move the score at most, at the pace so far. [S]"""
    planned = run.planned - int(run.setting("critic.warmup_steps", 0))
    return path(run) / np.maximum(policy_steps(run), 1) * max(planned, 1)


def _small(run: Run) -> Levels:
    done = policy_steps(run)
    warm = at_least(run["policy/learning_rate"], 0.5 * float(run.setting("optim.learning_rate", 0) or np.nan))
    settled = (done >= max(5, 0.1 * run.planned)) & (warm | (done >= run.planned / 4))
    known = settled & np.isfinite(run["policy/step_kl"])
    return levels((known & at_most(reach(run), 1.0), WARNING), (known & at_most(reach(run), 0.1), CRITICAL))


def _small_evidence(run: Run) -> Sequence[Evidence]:
    far = format_evidence(last(reach(run)))
    return [
        Evidence("policy/step_kl", f"at this pace the whole run can move the score by at most {far} of its deviation"),
        change_evidence(run, "objective/scores"),
        is_now(run, "policy/grad_norm"),
    ]


def _small_causes(run: Run) -> Sequence[Cause]:
    kl_coef, spread = last(run["objective/kl_coef"]), first(run["objective/shaped_scores_std"])
    without_gradient, share = last(run["policy/grad_norm"]) == 0, last(run["policy/step_scale"])
    nothing = Cause(
        "the scores teach nothing: they differ by less than the price of a nat, kl_coef, or not at all",
        applicable_texts(
            (without_gradient, "the policy's gradient is 0"),
            (share < 0.3, f"policy/step_scale, the factor of the learning rate for it, is {share:.2g}"),
        ),
        (),
        Change("rewards", "scores that tell the responses to a prompt apart; or a lower algorithm.kl_coef"),
    )
    return [
        *([nothing] if nothing.speaks_for else []),
        Cause(
            "the learning rate is too low",
            (f"optim.learning_rate is {run.setting('optim.learning_rate')}",),
            applicable_texts((without_gradient, "a gradient of 0 moves nothing at any rate")),
            scale_setting(run, "optim.learning_rate", 10),
        ),
        Cause(
            "the KL holds the policy too tightly",
            applicable_texts((kl_coef > spread, f"kl_coef {kl_coef:.3g} is above the scores' deviation {spread:.3g}")),
            applicable_texts((kl_coef <= spread, f"kl_coef {kl_coef:.3g} is below the scores' deviation {spread:.3g}")),
            scale_setting(run, "algorithm.kl_coef", 0.1),
        ),
    ]


def _skipped(run: Run) -> Levels:
    share = trailing_mean(run["update/skipped"], window(run))
    found = levels((at_least(share, 1e-9), NOTICE), (at_least(share, 0.1), WARNING), (at_least(share, 0.5), CRITICAL))
    if is_failure(run, "Diverged"):
        found[-1:] = CRITICAL
    return found


def _skipped_evidence(run: Run) -> Sequence[Evidence]:
    words = f"the run ended with {run.state.what}"
    ended = [Evidence("update/skipped", words)] if is_failure(run, "Diverged") else []
    return [
        *ended,
        is_now(run, "update/skipped", "share of a step's updates that were left out"),
        is_now(run, "policy/grad_norm"),
    ]


def _skipped_causes(run: Run) -> Sequence[Cause]:
    return [
        Cause(
            "the update would have done harm: a loss or gradient that is no number, or far too large",
            ("faults/ in the run folder holds the batch",),
            (),
            scale_setting(run, "optim.learning_rate", 0.3),
        ),
        Cause(
            "the scores are far too large",
            applicable_texts(
                (
                    last(run["objective/shaped_scores_std"]) > 100,
                    f"their deviation is {last(run['objective/shaped_scores_std']):.3g}",
                )
            ),
            applicable_texts(
                (
                    last(run["objective/shaped_scores_std"]) < 10,
                    f"their deviation is {last(run['objective/shaped_scores_std']):.3g}",
                )
            ),
            Change("reward.normalize", "running"),
        ),
    ]


RULES = (
    Rule(
        "updates-too-large",
        "One step moves the policy further than its answers can tell about.",
        "update",
        _large,
        _large_evidence,
        _large_causes,
        patience=2,
        follows=("stale-normaliser", "no-signal", "entropy-runaway"),
    ),
    Rule(
        "updates-too-small",
        "The updates hardly move the policy.",
        "update",
        _small,
        _small_evidence,
        _small_causes,
        follows=names(
            "learning-rate-schedule no-signal policy-collapse updates-too-large kl-too-tight prompts-repeated"
        ),
    ),
    Rule(
        "updates-skipped",
        "Updates are left out because they would have done harm.",
        "update",
        _skipped,
        _skipped_evidence,
        _skipped_causes,
        patience=1,
        follows=("updates-too-large", "reward-failures", "stale-normaliser"),
    ),
)
