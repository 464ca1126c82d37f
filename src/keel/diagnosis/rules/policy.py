"""Does the KL leave the policy room, does its entropy stay bounded, and do its responses end?"""

from collections.abc import Sequence

import numpy as np

from keel.diagnosis.advice import USUAL_KL, advantage_deviations, kl_unit, kl_units, scale_setting, score_deviation
from keel.diagnosis.chance import RISE, SIGNIFICANT, responses_per_step, score_rise
from keel.diagnosis.evidence import applicable_texts, change_evidence, current_evidence, ratio
from keel.diagnosis.findings import Cause, Change, Evidence
from keel.diagnosis.rule import (
    CRITICAL,
    MEASURED_IN_ZOO,
    NOTICE,
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
from keel.run.read.run import Run, Series
from keel.run.read.series import at_least, at_most, first, last, rise, start_mean, trailing_mean, window

TIGHT = Bounds(warning=3.0, critical=10.0)  # times the deviation of what the KL is weighed against
TIGHT_TARGET = 0.1  # nats per response
MEAN_STEPS = 3
RELIABLE_RESPONSES = 16  # with as many, the entropy of a single step is a reliable start
ENTROPY_RATIO = Bounds(warning=1.75, critical=2.5)  # of the start's
ENTROPY_RISE = Bounds(warning=0.4, critical=1.0)  # nats per token
BONUS_SHARE = 0.25  # of the advantages' deviation
CUT = Bounds(notice=0.3, critical=0.5)  # of the responses
CUT_RISE = 0.15  # of the responses


def _tight_levels(run: Run) -> Levels:
    spread, kl_coef = kl_units(run), run["objective/kl_coef"]
    target = run.setting("algorithm.target_kl")
    has_low_target = np.full(len(run.steps), target is not None and float(target) < TIGHT_TARGET)
    has_spread, is_settled = at_least(spread, 1e-6), run.steps >= 2
    return levels(
        ((at_least(kl_coef, TIGHT.warning * spread) & has_spread | has_low_target) & is_settled, WARNING),
        (at_least(kl_coef, TIGHT.critical * spread) & has_spread & is_settled, CRITICAL),
    )


def _tight_evidence(run: Run) -> Sequence[Evidence]:
    spread, kl_coef = kl_unit(run), last(run["objective/kl_coef"])
    # The optimum pi_ref exp(r / kl_coef) / Z, for scores of a normal distribution.
    distance, gain = 0.5 * ratio(spread, kl_coef) ** 2, ratio(spread, kl_coef)
    return [
        Evidence(
            "objective/kl_coef",
            f"{kl_coef:.3g}, where the scores' deviation is {spread:.3g}: the optimal policy is about "
            f"{distance:.2g} nats away and {gain:.2g} deviations better",
        ),
        change_evidence(run, "objective/kl"),
        change_evidence(run, "objective/scores"),
    ]


def _tight_causes(run: Run) -> Sequence[Cause]:
    spread, kl_coef = kl_unit(run), last(run["objective/kl_coef"])
    target = run.setting("algorithm.target_kl")
    return [
        Cause(
            "kl_coef is too large for scores of this scale",
            (f"kl_coef over the scores' deviation is {ratio(kl_coef, spread):.2g}; from 0.01 to 0.2 is usual",),
            (),
            Change("algorithm.kl_coef", f"{USUAL_KL * spread:.2g} (it is {kl_coef:.3g})"),
        ),
        Cause(
            "the target of the adaptive kl_coef is too small",
            applicable_texts((target is not None, f"target_kl is {target} nats per response")),
            applicable_texts((target is None, "target_kl is not set")),
            Change("algorithm.target_kl", "6"),
        ),
        Cause(
            "the scores are too small",
            applicable_texts((kl_coef <= 0.2, f"kl_coef, {kl_coef:.3g}, would be usual for scores of deviation 1")),
            applicable_texts((kl_coef > 0.2, f"kl_coef, {kl_coef:.3g}, is large for scores of deviation 1 too")),
            Change("reward.normalize", "reference"),
        ),
    ]


def _entropies(run: Run) -> tuple[Series, Series]:
    """Return the current and the initial entropy in nats per token. [S], [S]

    The initial entropy is that of step 1, before any update, if it is lower than the mean of three steps. A step of
    few responses is too noisy for that.
    """
    entropy = run["policy/entropy"]
    start = start_mean(entropy, MEAN_STEPS)
    if responses_per_step(run) >= RELIABLE_RESPONSES:
        start = np.fmin(start_mean(entropy, 1), start)
    return trailing_mean(entropy, MEAN_STEPS), start


def _entropy_bonus(run: Run) -> float:
    return float(run.setting("algorithm.entropy_coef", 0.0))


def _bonus_outweighs_score(run: Run) -> bool:
    """Whether the entropy bonus has ever paid as much as a considerable gain in score."""
    entropy, start = _entropies(run)
    gain = _entropy_bonus(run) * (entropy - start)
    return bool(at_least(gain, BONUS_SHARE * advantage_deviations(run)).any())


def _entropy_levels(run: Run) -> Levels:
    entropy, start = _entropies(run)
    mild, severe = (
        at_least(entropy, factor * start) & at_least(entropy - start, gain)
        for factor, gain in (
            (ENTROPY_RATIO.warning, ENTROPY_RISE.warning),
            (ENTROPY_RATIO.critical, ENTROPY_RISE.critical),
        )
    )
    is_useless = mild if _entropy_bonus(run) > 0 else mild & at_most(score_rise(run)[0], RISE)
    return levels((is_useless, WARNING), (severe, CRITICAL))


def _entropy_evidence(run: Run) -> Sequence[Evidence]:
    return [
        change_evidence(run, "policy/entropy", "nats per token"),
        change_evidence(run, "objective/scores"),
        current_evidence(run, "policy/step_kl"),
    ]


def _entropy_causes(run: Run) -> Sequence[Cause]:
    bonus = _entropy_bonus(run)
    has_jump = bool(at_least(run["policy/step_kl"], 0.1).any())
    return [
        Cause(
            "the entropy bonus outweighs the score",
            applicable_texts((bonus > 0, f"entropy_coef is {bonus:g}")),
            applicable_texts((bonus == 0, "entropy_coef is 0")),
            scale_setting(run, "algorithm.entropy_coef", 0.01) if bonus else Change("algorithm.entropy_coef", "0"),
        ),
        Cause(
            "the updates destroy what the policy had learned",
            applicable_texts((has_jump, "a step moved more than 0.1 nats per token")),
            applicable_texts((not has_jump, "no step moved more than 0.1 nats per token")),
            scale_setting(run, "optim.learning_rate", 0.2),
        ),
    ]


def _ends_levels(run: Run) -> Levels:
    cut = trailing_mean(run["response/truncated"], MEAN_STEPS)
    start = start_mean(run["response/truncated"], min(window(run), MEAN_STEPS))
    is_rising = at_least(cut - start, CUT_RISE) & at_least(rise(run, "response/truncated")[1], SIGNIFICANT)
    # Truncation from step 1 on can be intended, as for stories without an end, unless the settings penalise it.
    constant_level = WARNING if float(run.setting("reward.missing_eos_penalty", 0.0)) else NOTICE
    return levels(
        (at_least(cut, CUT.notice), constant_level),
        (is_rising, WARNING),
        (is_rising & at_least(cut, CUT.critical), CRITICAL),
    )


def _ends_evidence(run: Run) -> Sequence[Evidence]:
    limit = run.setting("rollout.max_response_tokens")
    return [
        change_evidence(run, "response/truncated", f"share that reached the limit of {limit} tokens"),
        change_evidence(run, "response/length"),
    ]


def _ends_causes(run: Run) -> Sequence[Cause]:
    limit, penalty = run.setting("rollout.max_response_tokens"), float(run.setting("reward.missing_eos_penalty", 0.0))
    from_start = first(trailing_mean(run["response/truncated"], window(run))) > 0.25
    grew = last(rise(run, "response/length")[0]) > 0
    truncated_at_start = applicable_texts((from_start, "responses were truncated from the first steps on"))
    ended_at_start = applicable_texts((not from_start, "the first responses ended before the limit"))
    short_limit = Cause(
        "the limit is too short for this model's responses",
        truncated_at_start,
        ended_at_start,
        Change("rollout.max_response_tokens", f"{2 * int(limit)} (it is {limit})" if limit else "twice as many"),
    )
    no_penalty = Cause(
        "nothing rewards an end",
        applicable_texts(
            (penalty == 0, "missing_eos_penalty is 0"), (grew and not from_start, "the responses grew up to the limit")
        ),
        applicable_texts((penalty > 0, f"missing_eos_penalty is {penalty:g}")),
        Change("reward.missing_eos_penalty", f"{max(score_deviation(run), 2 * penalty):.2g} (it is {penalty:g})"),
    )
    never_learned = Cause(
        "the model never learned to end: its supervised data had no end token",
        truncated_at_start,
        ended_at_start,
        Change("policy.model", "a model of keel sft on completions, which end with the end token"),
    )
    return [short_limit, never_learned, no_penalty] if from_start else [no_penalty, short_limit, never_learned]


# Before the rules of the updates in the catalogue: an entropy bonus makes updates too large.
ENTROPY = Rule(
    "entropy-runaway",
    "The entropy grows without a gain in score, and responses become noise.",
    "policy",
    _entropy_levels,
    _entropy_evidence,
    _entropy_causes,
    Documentation(
        measure=f"mean of `policy/entropy` over {MEAN_STEPS} steps, relative to the start's: the mean of the first "
        f"{MEAN_STEPS} steps, or that of step 1 if it is lower and has {RELIABLE_RESPONSES} responses",
        thresholds=(
            threshold("ratio to the start's", ENTROPY_RATIO),
            threshold("rise, nats per token", ENTROPY_RISE),
        ),
        combine="All rows must hold; for a warning there is also an entropy bonus, or a gain in score of at most "
        f"{RISE:g} sd.",
        note=f"Where `entropy_coef` * rise was ever {BONUS_SHARE:.0%} of the advantages' deviation, the bonus pays "
        "like a gain in score. The finding is then a root cause, and explains large updates.",
        source=MEASURED_IN_ZOO,
    ),
    follows=("updates-too-large", "sampler-mismatch"),
    is_root_cause=_bonus_outweighs_score,
)

RULES = (
    Rule(
        "kl-too-tight",
        "The KL penalty leaves the policy no room to improve.",
        "update",
        _tight_levels,
        _tight_evidence,
        _tight_causes,
        Documentation(
            measure="kl_coef / deviation, with `objective/kl_coef` and the largest windowed "
            "`objective/shaped_scores_std`",
            thresholds=(
                threshold("kl_coef / deviation", TIGHT),
                Threshold("`algorithm.target_kl`, nats per response", warning=f"< {TIGHT_TARGET:g}"),
            ),
            combine="Any row is enough.",
            note="The optimum is pi_ref exp(score / kl_coef) / Z. With d = deviation / kl_coef below 1 it is about "
            "d^2 / 2 nats from the reference and d deviations better. With `kl_in: loss` and normalised advantages "
            "their deviation, 1, replaces that of the scores.",
            source=MEASURED_IN_ZOO,
        ),
        patience=2,
        follows=rule_names("no-signal stale-normaliser policy-collapse updates-too-large"),
    ),
    Rule(
        "missing-ends",
        "Responses are truncated at the length limit.",
        "policy",
        _ends_levels,
        _ends_evidence,
        _ends_causes,
        Documentation(
            measure=f"mean of `response/truncated` over {MEAN_STEPS} steps",
            thresholds=(
                Threshold(
                    "share truncated",
                    notice=f">= {CUT.notice:.0%}",
                    warning=f">= {CUT.notice:.0%} with `reward.missing_eos_penalty`",
                ),
                Threshold(
                    f"rise of the share, >= {SIGNIFICANT:g} standard errors",
                    warning=f">= {CUT_RISE:.0%} of the responses",
                    critical=f"the same, and share >= {CUT.critical:.0%}",
                ),
            ),
            combine="Any row is enough.",
            note="A high share without a rise can be intended, as for stories without an end.",
            source=MEASURED_IN_ZOO,
        ),
        follows=rule_names("updates-too-large entropy-runaway sampler-mismatch reward-hacking kl-runaway value-offset"),
    ),
)
