"""Do sampler, trainer and reference agree on what a log-probability is?"""

from collections.abc import Sequence

import numpy as np

from keel.diagnosis.chance import SURE
from keel.diagnosis.findings import Cause, Change, Evidence
from keel.diagnosis.rule import CRITICAL, WARNING, Levels, Rule, applicable_texts, is_now, levels
from keel.run.read.run import Run, Series
from keel.run.read.series import at_least, at_most, first, last, step_noise, trailing_mean, window

LONG = 10  # steps: a mean KL below 0 must last, for that of a few answers often is


def _mismatch(run: Run) -> Levels:
    gap = trailing_mean(run["sampler/approx_kl"], 3)
    return levels((at_least(gap, 0.003), WARNING), (at_least(gap, 0.02), CRITICAL))


def _mismatch_evidence(run: Run) -> Sequence[Evidence]:
    return [
        is_now(run, "sampler/approx_kl", "nats a token between the policy that sampled and the same weights read again")
    ]


def _mismatch_causes(run: Run) -> Sequence[Cause]:
    dtype = str(run.setting("policy.dtype", "float32"))
    return [
        Cause(
            "the answers are sampled at another temperature, or from fewer tokens, than the trainer reckons with",
            applicable_texts(
                (last_gap(run) > 0.005, f"rounding alone does not come to {last_gap(run):.2g} nats a token")
            ),
            (),
            Change("rollout.temperature", "the temperature of whatever samples; no top-k, top-p or repetition penalty"),
        ),
        Cause(
            "sampler and trainer round differently",
            applicable_texts((dtype != "float32", f"policy.dtype is {dtype}")),
            applicable_texts((dtype == "float32", "policy.dtype is float32")),
            Change("policy.dtype", "float32"),
        ),
    ]


def last_gap(run: Run) -> float:
    return last(trailing_mean(run["sampler/approx_kl"], window(run)))


def _reference(run: Run) -> Levels:
    kl, length = run["objective/kl"], run["response/length"]
    at_start = run.steps == 1
    apart = at_start & at_least(np.abs(kl), 0.05) & at_least(np.abs(kl), 0.002 * length)
    below = at_most(trailing_mean(kl, LONG), -np.maximum(SURE * _wandering(kl) / np.sqrt(LONG), 0.05))
    below &= np.cumsum(np.isfinite(kl)) >= LONG
    asked = run.setting("reference") is not None
    seen = np.maximum.accumulate(apart) if len(apart) else apart
    return levels((seen, WARNING if asked else CRITICAL), (below, CRITICAL))


def _wandering(x: Series) -> Series:
    """The noise of a step, as its neighbours show it or the last steps together, whichever is more. [S]"""
    mean = trailing_mean(x, LONG)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.fmax(step_noise(x), np.sqrt(np.maximum(trailing_mean(x**2, LONG) - mean**2, 0)))


def _reference_evidence(run: Run) -> Sequence[Evidence]:
    said = f"{first(run['objective/kl']):.3g} nats an answer in the first step, before any update, where it should be 0"
    return [Evidence("objective/kl", said), is_now(run, "objective/kl", "below 0 by more than noise is a bug")]


def _reference_causes(run: Run) -> Sequence[Cause]:
    name = run.setting("reference")
    return [
        Cause(
            "the reference is not the model that the policy started from",
            applicable_texts((name is not None, f"reference is {name}, policy.model is {run.setting('policy.model')}")),
            applicable_texts((name is None, "no other reference was asked for")),
            Change("reference", "null, so that it is the policy's start"),
        ),
        Cause(
            "the log-probabilities of the two are taken in different ways (temperature, template, end tokens)",
            applicable_texts((name is None, "it is the start, and yet the KL is not 0")),
            (),
            Change("", "keel train --check says which"),
        ),
    ]


RULES = (
    Rule(
        "sampler-mismatch",
        "The log-probabilities that the answers were sampled with are not those that the trainer computes.",
        "sampler",
        _mismatch,
        _mismatch_evidence,
        _mismatch_causes,
        patience=2,
    ),
    Rule(
        "wrong-reference",
        "The policy is held to another model than the one it started from.",
        "reference",
        _reference,
        _reference_evidence,
        _reference_causes,
        patience=1,
        follows=("sampler-mismatch",),
        lasts=True,
    ),
)
