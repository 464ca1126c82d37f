"""Does each update move the policy far enough to learn, and no further than its responses justify?"""

from collections.abc import Sequence

import numpy as np

from keel.diagnosis.advice import scale_setting
from keel.diagnosis.evidence import applicable_texts, change_evidence, current_evidence, format_evidence
from keel.diagnosis.findings import Cause, Change, Evidence
from keel.diagnosis.rule import (
    CRITICAL,
    MEASURED_IN_ZOO,
    TESTED_ON_SYNTHETIC_RUNS,
    Bounds,
    Documentation,
    Levels,
    Rule,
    Threshold,
    is_failure,
    levels_at_least,
    levels_at_most,
    rule_names,
    threshold,
)
from keel.run.read.run import Run, Series
from keel.run.read.series import (
    at_least,
    first,
    highest,
    last,
    policy_steps,
    trailing_mean,
    trailing_median,
    window,
)

MEDIAN_STEPS = 5
STEP_KL = Bounds(warning=0.2, critical=0.5)  # nats per token, of policy/step_kl and policy/approx_kl
CLIPPED_TOKENS = Bounds(warning=0.3, critical=0.5)  # of the tokens
REACH = Bounds(warning=1.0, critical=0.1)  # deviations of the score
WARM_RATE = 0.5  # of optim.learning_rate: from here on the pace of the updates is typical
SKIPPED = Bounds(notice=1e-9, warning=0.1, critical=0.5)  # of the updates


def _large_levels(run: Run) -> Levels:
    # Estimates of a KL have heavy tails: one unlikely token makes a step look large. A median ignores it.
    step_kl, approx_kl, clipped = (
        trailing_median(run[f"policy/{name}"], MEDIAN_STEPS) for name in ("step_kl", "approx_kl", "clipfrac")
    )
    by_kl = np.maximum(levels_at_least(step_kl, STEP_KL), levels_at_least(approx_kl, STEP_KL))
    return np.maximum(by_kl, levels_at_least(clipped, CLIPPED_TOKENS))


def _large_evidence(run: Run) -> Sequence[Evidence]:
    worst = format_evidence(last(highest(run["policy/step_kl"])))
    return [
        Evidence("policy/step_kl", f"up to {worst} nats per token in one step; below 0.05 is usual"),
        current_evidence(run, "policy/approx_kl", "mean over the epochs of a step"),
        current_evidence(run, "policy/clipfrac", "share of tokens that are clipped; below 0.2 is usual"),
    ]


def _large_causes(run: Run) -> Sequence[Cause]:
    epochs = float(run.setting("algorithm.update_epochs", 1))
    norm, limit = last(run["policy/grad_norm"]), float(run.setting("optim.max_grad_norm", 1.0) or np.nan)
    is_clipping = last(trailing_mean(run["policy/clipfrac"], 3)) > CLIPPED_TOKENS.warning
    jump = last(highest(trailing_median(run["policy/step_kl"], MEDIAN_STEPS)))
    peak = run.setting("optim.learning_rate", np.nan)
    has_no_limit = run.setting("algorithm.max_approx_kl") is None
    high_rate = Cause(
        "the learning rate is too high",
        applicable_texts(
            (jump > STEP_KL.warning, f"at a rate of {peak:g} a step moves {jump:.2g} nats per token"),
            (norm > limit, f"the gradient norm, {norm:.2g}, is clipped to {limit:g}, so the rate sets the step size"),
        ),
        (),
        scale_setting(run, "optim.learning_rate", 0.2),
    )
    many_epochs = Cause(
        "each batch is used too often",
        (f"update_epochs is {epochs:g}",),
        applicable_texts((not is_clipping, "few tokens are clipped")),
        Change("algorithm.update_epochs", f"{max(1, round(min(epochs / 4, 4)))} (it is {epochs:g})"),
    )
    no_limit = Cause(
        "nothing ends a step's epochs when the policy has moved far enough",
        applicable_texts((has_no_limit, "max_approx_kl is not set")),
        (),
        Change("algorithm.max_approx_kl", "0.05"),
    )
    if epochs <= 1:
        return [high_rate]
    order = [many_epochs, high_rate] if epochs > 8 else [high_rate, many_epochs]
    return [*order, no_limit] if has_no_limit else order


def score_reach(run: Run) -> Series:
    """Return the largest change of the mean score that the updates so far can have caused, in its deviations. [S]

    The sum over steps of sqrt(2 K), K in nats per response: the bound of `reward-shift`.
    """
    nats = np.maximum(run["policy/step_kl"], 0) * run["response/length"]
    return np.asarray(np.nancumsum(np.sqrt(2 * nats)))


def projected_reach(run: Run) -> Series:
    """Return the largest possible change of the mean score over the full run at the current pace, in deviations. [S]"""
    planned = run.planned - int(run.setting("critic.warmup_steps", 0))
    return score_reach(run) / np.maximum(policy_steps(run), 1) * max(planned, 1)


def _small_levels(run: Run) -> Levels:
    done = policy_steps(run)
    is_warm = at_least(run["policy/learning_rate"], WARM_RATE * float(run.setting("optim.learning_rate", 0) or np.nan))
    is_settled = (done >= max(5, 0.1 * run.planned)) & (is_warm | (done >= run.planned / 4))
    reach = np.where(is_settled & np.isfinite(run["policy/step_kl"]), projected_reach(run), np.nan)
    return levels_at_most(reach, REACH)


def _small_evidence(run: Run) -> Sequence[Evidence]:
    reach = format_evidence(last(projected_reach(run)))
    return [
        Evidence("policy/step_kl", f"at this pace the run can move the score by at most {reach} of its deviation"),
        change_evidence(run, "objective/scores"),
        current_evidence(run, "policy/grad_norm"),
    ]


def _small_causes(run: Run) -> Sequence[Cause]:
    kl_coef, spread = last(run["objective/kl_coef"]), first(run["objective/shaped_scores_std"])
    has_no_gradient, step_scale = last(run["policy/grad_norm"]) == 0, last(run["policy/step_scale"])
    no_signal = Cause(
        "the scores give no signal: they differ by less than kl_coef, the price of a nat, or not at all",
        applicable_texts(
            (has_no_gradient, "the policy's gradient is 0"),
            (step_scale < 0.3, f"policy/step_scale, which scales the learning rate for this, is {step_scale:.2g}"),
        ),
        (),
        Change("rewards", "scores that distinguish the responses to a prompt; or a lower algorithm.kl_coef"),
    )
    comparison = f"the scores' deviation {spread:.3g}"
    return [
        *([no_signal] if no_signal.speaks_for else []),
        Cause(
            "the learning rate is too low",
            (f"optim.learning_rate is {run.setting('optim.learning_rate')}",),
            applicable_texts((has_no_gradient, "a gradient of 0 moves nothing at any rate")),
            scale_setting(run, "optim.learning_rate", 10),
        ),
        Cause(
            "the KL penalty is too strong",
            applicable_texts((kl_coef > spread, f"kl_coef {kl_coef:.3g} is above {comparison}")),
            applicable_texts((kl_coef <= spread, f"kl_coef {kl_coef:.3g} is not above {comparison}")),
            scale_setting(run, "algorithm.kl_coef", 0.1),
        ),
    ]


def _skipped_levels(run: Run) -> Levels:
    result = levels_at_least(trailing_mean(run["update/skipped"], window(run)), SKIPPED)
    if is_failure(run, "Diverged"):
        result[-1:] = CRITICAL
    return result


def _skipped_evidence(run: Run) -> Sequence[Evidence]:
    text = f"the run ended with {run.state.what}"
    return [
        *([Evidence("update/skipped", text)] if is_failure(run, "Diverged") else []),
        current_evidence(run, "update/skipped", "share of a step's updates that were skipped"),
        current_evidence(run, "policy/grad_norm"),
    ]


def _skipped_causes(run: Run) -> Sequence[Cause]:
    spread = last(run["objective/shaped_scores_std"])
    spread_text = f"their deviation is {spread:.3g}"
    return [
        Cause(
            "a loss or gradient that is not finite, or far too large",
            ("faults/ in the run folder holds the batch",),
            (),
            scale_setting(run, "optim.learning_rate", 0.3),
        ),
        Cause(
            "the scores are far too large",
            applicable_texts((spread > 100, spread_text)),
            applicable_texts((spread < 10, spread_text)),
            Change("reward.normalize", "running"),
        ),
    ]


RULES = (
    Rule(
        "updates-too-large",
        "One step moves the policy further than its responses justify.",
        "update",
        _large_levels,
        _large_evidence,
        _large_causes,
        Documentation(
            measure=f"median over {MEDIAN_STEPS} steps of `policy/step_kl`, `policy/approx_kl` and `policy/clipfrac`",
            thresholds=(
                threshold("`policy/step_kl` or `policy/approx_kl`, nats per token", STEP_KL),
                threshold("`policy/clipfrac`, share of tokens", CLIPPED_TOKENS, ">= {:.0%}"),
            ),
            combine="Any row is enough.",
            note="Usual steps are 0.001 to 0.05 nats per token. The rule uses a median, because estimates of a KL have "
            "heavy tails.",
            source="Schulman et al. 2017 aim at 0.003 to 0.03; OpenAI's runs have a clipfrac below 0.002; "
            + MEASURED_IN_ZOO,
        ),
        patience=2,
        follows=("stale-normaliser", "no-signal", "entropy-runaway"),
    ),
    Rule(
        "updates-too-small",
        "The updates hardly move the policy.",
        "update",
        _small_levels,
        _small_evidence,
        _small_causes,
        Documentation(
            measure="reach = sum over steps of sqrt(2 K), K = `policy/step_kl` * `response/length`, extrapolated to "
            "the end of the run: the most by which the updates can move the mean score, in sd",
            thresholds=(threshold("reach of the full run, in sd", REACH, "<= {:g}"),),
            note="Steps in which only the critic learns do not count. The rule begins after a tenth of the run and 5 "
            f"steps, once the learning rate is {WARM_RATE:.0%} of its setting, or after a quarter of the run.",
            source="the bound of `reward-shift`; " + MEASURED_IN_ZOO,
        ),
        follows=rule_names(
            "learning-rate-schedule no-signal policy-collapse updates-too-large kl-too-tight prompts-repeated"
        ),
    ),
    Rule(
        "updates-skipped",
        "Updates are skipped because they would damage the model.",
        "update",
        _skipped_levels,
        _skipped_evidence,
        _skipped_causes,
        Documentation(
            measure="mean of `update/skipped` over a window",
            thresholds=(
                Threshold(
                    "share of updates skipped",
                    notice="> 0",
                    warning=f">= {SKIPPED.warning:.0%}",
                    critical=f">= {SKIPPED.critical:.0%}",
                ),
                Threshold("end of the run", critical="a `Diverged` error"),
            ),
            combine="Any row is enough.",
            source=TESTED_ON_SYNTHETIC_RUNS,
        ),
        patience=1,
        follows=("updates-too-large", "reward-failures", "stale-normaliser"),
    ),
)
