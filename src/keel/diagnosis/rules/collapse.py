"""Late effects of other faults: a policy that repeats itself, or that moves away from the reference for no gain."""

from collections.abc import Sequence

import numpy as np

from keel.diagnosis.advice import kl_unit, kl_units, raise_kl, scale_setting
from keel.diagnosis.chance import (
    RISE,
    SCORES,
    SIGNIFICANT,
    deviation_unit,
    held_out_score_rose,
    is_solved,
    mean_error,
    resolution,
    score_rise,
    spread_metric,
)
from keel.diagnosis.evidence import applicable_texts, change_evidence, format_evidence, ratio
from keel.diagnosis.findings import Cause, Change, Evidence
from keel.diagnosis.rule import (
    CRITICAL,
    MEASURED_IN_ZOO,
    TESTED_ON_SYNTHETIC_RUNS,
    WARNING,
    Bounds,
    Documentation,
    Levels,
    Rule,
    Threshold,
    levels,
    rule_names,
)
from keel.run.read.run import Run
from keel.run.read.series import (
    Holds,
    at_least,
    at_most,
    first,
    last,
    rise,
    shift_steps,
    start_mean,
    trailing_mean,
    window,
)

KL_GROWTH, KL_RISE = 1.5, 2.0  # times, and nats per response, over two windows
FLAT_ERRORS = 0.5  # standard errors
DETECTABLE = 0.25  # deviations: a rise of this size would have been detected
SCORES_DIFFER = 0.25  # of their largest deviation
FAR_ENTROPIES, FAR_KL = 2.0, 0.5  # of the start's entropy, and nats per token
TARGET_FACTOR = 2.0
LOSS, LOSS_KL = 0.5, 2.0  # deviations by which the KL costs more than the score gained, and nats per response
TYPICAL_KL = (0.02, 0.1)  # kl_coef over the scores' deviation: below is weak, above is not

START_STEPS = 3
SHORT_RESPONSE = 8  # tokens: a label or a number, of which a task has few
VARIED = 0.5  # of the first responses are different
ALIKE = 0.5  # of the initial share of different responses
REPETITION = 0.15  # of the 4-grams
ENTROPY_LEFT = Bounds(warning=0.1, critical=0.02)  # of the start's
LOW_ENTROPY = 0.3  # of the start's


def _grows_for_nothing(run: Run) -> Holds:
    """Whether the KL grew over two windows while the score, whose rise would have been detected, did not. [S]"""
    width = window(run)
    kl, score = trailing_mean(run["objective/kl"], width), trailing_mean(run[SCORES], width)
    previous_kl, previous_score = shift_steps(kl, 2 * width), shift_steps(score, 2 * width)
    error = mean_error(run, SCORES) * np.sqrt(2 / width)
    grew = at_least(kl, KL_GROWTH * previous_kl) & at_least(kl - previous_kl, KL_RISE)
    is_detectable = at_most(resolution(run), DETECTABLE)
    scores = trailing_mean(run[spread_metric(SCORES)], width)
    scores_differ = at_least(scores, SCORES_DIFFER * deviation_unit(run, SCORES))
    is_flat = at_most(score - previous_score, FLAT_ERRORS * error)
    return grew & is_detectable & scores_differ & ~is_solved(run, width) & is_flat


def _runaway_levels(run: Run) -> Levels:
    width = window(run)
    kl, length = trailing_mean(run["objective/kl"], width), trailing_mean(run["response/length"], width)
    with np.errstate(invalid="ignore", divide="ignore"):
        per_token = kl / length
        costs = -trailing_mean(run["objective/non_score_reward"], width) / kl_units(run)
    is_far = at_least(per_token, FAR_ENTROPIES * start_mean(run["policy/entropy"], width))
    is_far &= at_least(per_token, FAR_KL)
    target = run.setting("algorithm.target_kl")
    is_off_target = at_least(kl, TARGET_FACTOR * float(target) if target is not None else np.inf)
    # The gain is that of the raw score: a running normaliser removes it from the shaped one.
    loss = costs - score_rise(run)[0]
    has_loss = at_least(loss, LOSS + resolution(run)) & at_least(costs, 1e-9) & at_least(kl, LOSS_KL)
    for_nothing = _grows_for_nothing(run)
    return levels(
        (for_nothing | is_off_target | is_far | has_loss, WARNING), (is_far & (for_nothing | has_loss), CRITICAL)
    )


def _runaway_evidence(run: Run) -> Sequence[Evidence]:
    length = last(trailing_mean(run["response/length"], window(run)))
    kl = last(trailing_mean(run["objective/kl"], window(run)))
    entropy = format_evidence(first(run["policy/entropy"]))
    return [
        change_evidence(
            run,
            "objective/kl",
            f"{format_evidence(ratio(kl, length))} nats per token; the initial entropy was {entropy}",
        ),
        change_evidence(run, "objective/scores"),
        change_evidence(run, "objective/non_score_reward", "the cost of the KL"),
    ]


def _runaway_causes(run: Run) -> Sequence[Cause]:
    gain = last(score_rise(run)[0])
    kl_coef, spread = last(run["objective/kl_coef"]), kl_unit(run)
    step_kl = last(run["policy/step_kl"])
    comparison = (
        f"kl_coef over the scores' deviation is {format_evidence(ratio(kl_coef, spread))}; from 0.01 to 0.2 is usual"
    )
    step_text = f"a step moves {step_kl:.2g} nats per token"
    return [
        Cause(
            "kl_coef is too small for scores of this scale",
            applicable_texts((kl_coef < TYPICAL_KL[0] * spread, comparison)),
            applicable_texts((kl_coef > TYPICAL_KL[1] * spread, comparison)),
            raise_kl(run, 3),
        ),
        Cause(
            "the score is mostly noise, and the policy fits the noise",
            applicable_texts((gain < 0.5, f"the score has risen by only {gain:.2g} of its deviation")),
            applicable_texts((gain >= 0.5, f"the score has risen by {gain:.2g} of its deviation")),
            Change("rollout.batch_size", "more responses in each step, or a scorer without noise"),
        ),
        Cause(
            "the updates are too large",
            applicable_texts((step_kl > 0.05, step_text)),
            applicable_texts((step_kl < 0.02, step_text)),
            scale_setting(run, "optim.learning_rate", 0.3),
        ),
    ]


def _collapse_levels(run: Run) -> Levels:
    width, start_width = window(run), min(window(run), START_STEPS)
    entropy = trailing_mean(run["policy/entropy"], START_STEPS)
    entropy_left = entropy / np.maximum(start_mean(run["policy/entropy"], width), 1e-9)
    distinct = trailing_mean(run["response/distinct"], START_STEPS)
    initial_distinct = start_mean(run["response/distinct"], start_width)
    # Where a task has few possible responses, or each prompt one right response, to learn it is to repeat it.
    is_varied = at_least(initial_distinct, VARIED)
    is_varied &= at_least(start_mean(run["response/length"], start_width), SHORT_RESPONSE)
    is_alike = is_varied & at_most(distinct, ALIKE * np.fmin(initial_distinct, run["prompts/distinct"]))
    repeats = at_least(rise(run, "response/repetition")[0], REPETITION) & ~held_out_score_rose(run)
    has_no_gain = at_most(score_rise(run)[0], RISE)
    is_certain = at_most(entropy_left, ENTROPY_LEFT.warning) & (is_varied | has_no_gain)
    return levels(
        (is_certain | is_alike, WARNING),
        (at_most(entropy_left, LOW_ENTROPY) & (is_alike | repeats), CRITICAL),
        (is_certain & at_most(entropy_left, ENTROPY_LEFT.critical), CRITICAL),
    )


def _collapse_evidence(run: Run) -> Sequence[Evidence]:
    return [
        change_evidence(run, "policy/entropy", "nats per token"),
        change_evidence(run, "response/distinct", "share of different responses in a step"),
        change_evidence(run, "response/repetition", "share of 4-grams that occur earlier in the response"),
    ]


def _collapse_causes(run: Run) -> Sequence[Cause]:
    kl_coef, spread = last(run["objective/kl_coef"]), kl_unit(run)
    comparison = (
        f"kl_coef is {format_evidence(kl_coef)}; the deviation of what it is weighed against is "
        f"{format_evidence(spread)}"
    )
    bonus = float(run.setting("algorithm.entropy_coef", 0.0))
    step_kl = run["policy/step_kl"]
    return [
        Cause(
            "the KL penalty is too weak",
            applicable_texts((kl_coef < TYPICAL_KL[0] * spread, comparison)),
            applicable_texts((kl_coef > TYPICAL_KL[1] * spread, comparison)),
            raise_kl(run, 3),
        ),
        Cause(
            "one step was too large, and the policy it left no longer varies",
            applicable_texts((bool(at_least(step_kl, 0.3).any()), "a step moved more than 0.3 nats per token")),
            applicable_texts((not at_least(step_kl, 0.1).any(), "no step moved more than 0.1 nats per token")),
            scale_setting(run, "optim.learning_rate", 0.2),
        ),
        Cause(
            "nothing rewards variety",
            applicable_texts((bonus == 0, "entropy_coef is 0")),
            applicable_texts((bonus > 0, f"entropy_coef is {bonus:g}")),
            Change("algorithm.entropy_coef", f"{max(0.01, 2 * bonus):g}"),
        ),
    ]


RULES = (
    Rule(
        "policy-collapse",
        "The policy repeats the same response.",
        "policy",
        _collapse_levels,
        _collapse_evidence,
        _collapse_causes,
        Documentation(
            measure=f"`response/distinct`, `policy/entropy` and `response/repetition`, means of {START_STEPS} steps, "
            "relative to the start's",
            thresholds=(
                Threshold(
                    "A: `response/distinct` / the smaller of its start and `prompts/distinct`",
                    warning=f"<= {ALIKE:.0%}",
                    critical=f"<= {ALIKE:.0%}, entropy <= {LOW_ENTROPY:.0%}",
                ),
                Threshold(
                    "B: `policy/entropy` / start's",
                    warning=f"<= {ENTROPY_LEFT.warning:.0%}",
                    critical=f"<= {ENTROPY_LEFT.critical:.0%}",
                ),
                Threshold(
                    "C: rise of `response/repetition`",
                    critical=f">= {REPETITION:.0%} of the 4-grams, entropy <= {LOW_ENTROPY:.0%}",
                ),
            ),
            combine="Any row is enough.",
            note=f"Where a task has few responses (less than {VARIED:.0%} of the first ones differ, or they have fewer "
            f"than {SHORT_RESPONSE} tokens), a policy that learns it repeats them. There A does not count, and B only "
            f"without a gain of {RISE:g} sd. C does not count while a held-out scorer is {RISE:g} sd and "
            f"{SIGNIFICANT:g} se above its start.",
            source=TESTED_ON_SYNTHETIC_RUNS,
        ),
        follows=rule_names(
            "updates-too-large prompts-repeated reward-hacking reward-inverted length-exploitation "
            "missing-ends stale-normaliser sampler-mismatch critic-lagging value-offset"
        ),
    ),
    Rule(
        "kl-runaway",
        "The KL to the reference grows for little or no gain.",
        "update",
        _runaway_levels,
        _runaway_evidence,
        _runaway_causes,
        Documentation(
            measure="KL = mean of `objective/kl` over a window; cost = -`objective/non_score_reward` in deviations of "
            "what the KL is weighed against",
            thresholds=(
                Threshold(
                    f"A: growth of the KL over two windows, with a score rise <= {FLAT_ERRORS:g} se",
                    warning=f">= {KL_GROWTH:g} times and {KL_RISE:g} nats",
                ),
                Threshold("B: KL / `algorithm.target_kl`", warning=f">= {TARGET_FACTOR:g}"),
                Threshold(
                    f"C: cost - score rise, with a KL >= {LOSS_KL:g} nats",
                    warning=f">= {LOSS:g} sd + 2 se",
                ),
                Threshold(
                    "D: KL per token",
                    warning=f">= {FAR_ENTROPIES:g} times the start's entropy and {FAR_KL:g} nats",
                    critical="the same, with A or C",
                ),
            ),
            combine="Any row is enough.",
            note=f"A counts only where a rise of {DETECTABLE:g} sd would have been detected, the scores keep "
            f"{SCORES_DIFFER:.0%} of their largest deviation, and the task is not solved (`no-signal`).",
            source=MEASURED_IN_ZOO,
        ),
        follows=rule_names(
            "updates-too-large reward-hacking reward-inverted policy-collapse entropy-runaway "
            "wrong-reference missing-ends length-exploitation sampler-mismatch reward-shift stale-normaliser "
            "kl-too-tight no-signal prompts-repeated"
        ),
    ),
)
