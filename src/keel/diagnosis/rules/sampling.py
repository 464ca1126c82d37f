"""Do the sampler, the trainer and the reference compute the same log-probabilities?"""

from collections.abc import Sequence

import numpy as np

from keel.diagnosis.chance import SIGNIFICANT
from keel.diagnosis.evidence import applicable_texts, current_evidence
from keel.diagnosis.findings import Cause, Change, Evidence
from keel.diagnosis.rule import (
    CRITICAL,
    MEASURED_IN_ZOO,
    WARNING,
    Bounds,
    Documentation,
    Levels,
    Rule,
    Threshold,
    levels,
    levels_at_least,
    threshold,
)
from keel.run.read.run import Run, Series
from keel.run.read.series import at_least, at_most, first, last, step_noise, trailing_mean, window

GAP_STEPS = 3
GAP = Bounds(warning=0.003, critical=0.02)  # nats per token
MORE_THAN_ROUNDING = 0.005  # nats per token
START_KL, START_KL_PER_TOKEN = 0.05, 0.002  # nats in step 1, in which no update has been made
NEGATIVE_STEPS = 10  # the mean of a few responses' KL is often below 0 by chance
NEGATIVE_KL = 0.05  # nats


def _mismatch_levels(run: Run) -> Levels:
    return levels_at_least(trailing_mean(run["sampler/approx_kl"], GAP_STEPS), GAP)


def _mismatch_evidence(run: Run) -> Sequence[Evidence]:
    return [current_evidence(run, "sampler/approx_kl", "nats per token between the sampler and the trainer")]


def _mismatch_causes(run: Run) -> Sequence[Cause]:
    dtype = str(run.setting("policy.dtype", "float32"))
    gap = last(trailing_mean(run["sampler/approx_kl"], window(run)))
    return [
        Cause(
            "the sampler uses another temperature, or fewer tokens, than the trainer assumes",
            applicable_texts((gap > MORE_THAN_ROUNDING, f"rounding alone does not reach {gap:.2g} nats per token")),
            (),
            Change("rollout.temperature", "the sampler's temperature; no top-k, top-p or repetition penalty"),
        ),
        Cause(
            "sampler and trainer round differently",
            applicable_texts((dtype != "float32", f"policy.dtype is {dtype}")),
            applicable_texts((dtype == "float32", "policy.dtype is float32")),
            Change("policy.dtype", "float32"),
        ),
    ]


def _reference_levels(run: Run) -> Levels:
    kl, length = run["objective/kl"], run["response/length"]
    distance = np.abs(kl)
    starts_away = (run.steps == 1) & at_least(distance, START_KL) & at_least(distance, START_KL_PER_TOKEN * length)
    error = _kl_noise(kl) / np.sqrt(NEGATIVE_STEPS)
    negative = at_most(trailing_mean(kl, NEGATIVE_STEPS), -np.maximum(SIGNIFICANT * error, NEGATIVE_KL))
    negative &= np.cumsum(np.isfinite(kl)) >= NEGATIVE_STEPS
    has_reference_setting = run.setting("reference") is not None
    started_away = np.maximum.accumulate(starts_away) if len(starts_away) else starts_away
    return levels((started_away, WARNING if has_reference_setting else CRITICAL), (negative, CRITICAL))


def _kl_noise(x: Series) -> Series:
    """Return the noise of one step: the larger of its neighbours' differences and the recent deviation. [S]"""
    mean = trailing_mean(x, NEGATIVE_STEPS)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.fmax(step_noise(x), np.sqrt(np.maximum(trailing_mean(x**2, NEGATIVE_STEPS) - mean**2, 0)))


def _reference_evidence(run: Run) -> Sequence[Evidence]:
    text = f"{first(run['objective/kl']):.3g} nats per response in step 1, before any update; it should be 0"
    return [
        Evidence("objective/kl", text),
        current_evidence(run, "objective/kl", "below 0 by more than noise is a bug"),
    ]


def _reference_causes(run: Run) -> Sequence[Cause]:
    name = run.setting("reference")
    return [
        Cause(
            "the reference is not the model that the policy started from",
            applicable_texts((name is not None, f"reference is {name}, policy.model is {run.setting('policy.model')}")),
            applicable_texts((name is None, "reference is not set")),
            Change("reference", "null, so that it is the initial policy"),
        ),
        Cause(
            "the two log-probabilities are computed differently (temperature, template, end tokens)",
            applicable_texts((name is None, "the reference is the initial policy, and its KL is not 0")),
            (),
            Change("", "run keel train --check, which compares them"),
        ),
    ]


RULES = (
    Rule(
        "sampler-mismatch",
        "The log-probabilities of the sampler differ from those of the trainer.",
        "sampler",
        _mismatch_levels,
        _mismatch_evidence,
        _mismatch_causes,
        Documentation(
            measure=f"mean of `sampler/approx_kl` over {GAP_STEPS} steps, in nats per token",
            thresholds=(threshold("`sampler/approx_kl`", GAP),),
            source=f"{MEASURED_IN_ZOO}; prime-rl accepts 0.01 on GPUs",
            note="Rounding gives 1e-6 in float32 and up to 1e-3 in bfloat16. A sampling temperature of 1.3 instead of "
            "1 gives a few hundredths.",
        ),
        patience=2,
    ),
    Rule(
        "wrong-reference",
        "The KL is measured to a model other than the initial policy.",
        "reference",
        _reference_levels,
        _reference_evidence,
        _reference_causes,
        Documentation(
            measure="`objective/kl`: it is 0 in step 1, before any update, and its mean cannot be negative",
            thresholds=(
                Threshold(
                    "abs(`objective/kl`) in step 1",
                    warning=f">= {START_KL:g} nats and >= {START_KL_PER_TOKEN:g} per token, with `reference` set",
                    critical="the same, without `reference`",
                ),
                Threshold(
                    f"mean of `objective/kl` over {NEGATIVE_STEPS} steps",
                    critical=f"<= -{NEGATIVE_KL:g} nats and <= -{SIGNIFICANT:g} standard errors",
                ),
            ),
            combine="Any row is enough.",
            source=MEASURED_IN_ZOO,
        ),
        patience=1,
        follows=("sampler-mismatch",),
        stays_open=True,
    ),
)
