"""What other faults lead to in the end: a policy that says one thing, or one that has run away."""

from collections.abc import Sequence

import numpy as np

from keel.diagnosis.chance import (
    SCORES,
    held_out_score_rose,
    is_solved,
    mean_error,
    resolution,
    score_rise,
    spread_metric,
    yardstick,
)
from keel.diagnosis.findings import Cause, Change, Evidence
from keel.diagnosis.rule import (
    CRITICAL,
    WARNING,
    Levels,
    Rule,
    applicable_texts,
    change_evidence,
    format_evidence,
    kl_unit,
    kl_units,
    levels,
    names,
    raise_kl,
    ratio,
    scale_setting,
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

SHORT = 8  # tokens: a label or a number, of which a task has few


def _for_nothing(run: Run) -> Holds:
    """The KL grew by half and by two nats over two windows, and the score, whose rise would have been seen, did not."""
    width = window(run)
    kl, score = trailing_mean(run["objective/kl"], width), trailing_mean(run[SCORES], width)
    error = mean_error(run, SCORES) * np.sqrt(2 / width)
    grown = at_least(kl, 1.5 * shift_steps(kl, 2 * width)) & at_least(kl - shift_steps(kl, 2 * width), 2.0)
    seen = at_most(resolution(run), 0.25)
    varies = at_least(trailing_mean(run[spread_metric(SCORES)], width), 0.25 * yardstick(run, SCORES))
    return grown & seen & varies & ~is_solved(run, width) & at_most(score - shift_steps(score, 2 * width), 0.5 * error)


def _runaway(run: Run) -> Levels:
    width = window(run)
    kl, length = trailing_mean(run["objective/kl"], width), trailing_mean(run["response/length"], width)
    with np.errstate(invalid="ignore", divide="ignore"):
        per_token = kl / length
    typical = start_mean(run["policy/entropy"], width)
    far = at_least(per_token, 2.0 * typical) & at_least(per_token, 0.5)
    target = run.setting("algorithm.target_kl")
    missed = at_least(kl, 2 * float(target)) if target is not None else np.zeros(len(kl), dtype=bool)
    # The raw score tells the gain: a running normaliser takes it away again.
    with np.errstate(invalid="ignore", divide="ignore"):
        costs = -trailing_mean(run["objective/non_score_reward"], width) / kl_units(run)
    loss = at_least(costs - score_rise(run)[0], 0.5 + resolution(run)) & at_least(costs, 1e-9) & at_least(kl, 2.0)
    return levels((_for_nothing(run) | missed | far | loss, WARNING), (far & (_for_nothing(run) | loss), CRITICAL))


def _runaway_evidence(run: Run) -> Sequence[Evidence]:
    length = last(trailing_mean(run["response/length"], window(run)))
    kl = last(trailing_mean(run["objective/kl"], window(run)))
    return [
        change_evidence(
            run,
            "objective/kl",
            f"{format_evidence(ratio(kl, length))} nats a token; "
            f"the entropy was {format_evidence(first(run['policy/entropy']))} at first",
        ),
        change_evidence(run, "objective/scores"),
        change_evidence(run, "objective/non_score_reward", "what the KL costs"),
    ]


def _runaway_causes(run: Run) -> Sequence[Cause]:
    gain, _ = score_rise(run)
    kl_coef, spread = last(run["objective/kl_coef"]), kl_unit(run)
    beside = (
        f"kl_coef over the scores' deviation is {format_evidence(ratio(kl_coef, spread))}; from 0.01 to 0.2 is usual"
    )
    return [
        Cause(
            "kl_coef is too small for scores of this scale",
            applicable_texts((kl_coef < 0.02 * spread, beside)),
            applicable_texts((kl_coef > 0.1 * spread, beside)),
            raise_kl(run, 3),
        ),
        Cause(
            "the score is mostly noise, which the policy follows",
            applicable_texts((last(gain) < 0.5, f"the score has risen by only {last(gain):.2g} of its deviation")),
            applicable_texts((last(gain) >= 0.5, f"the score has risen by {last(gain):.2g} of its deviation")),
            Change("rollout.batch_size", "more answers a step, or a scorer that says the same of the same answer"),
        ),
        Cause(
            "the updates are too large",
            applicable_texts(
                (last(run["policy/step_kl"]) > 0.05, f"a step moves {last(run['policy/step_kl']):.2g} nats a token")
            ),
            applicable_texts(
                (last(run["policy/step_kl"]) < 0.02, f"a step moves {last(run['policy/step_kl']):.2g} nats a token")
            ),
            scale_setting(run, "optim.learning_rate", 0.3),
        ),
    ]


def _collapse(run: Run) -> Levels:
    width = window(run)
    entropy = trailing_mean(run["policy/entropy"], 3)
    left = entropy / np.maximum(start_mean(run["policy/entropy"], width), 1e-9)
    distinct, begun = trailing_mean(run["response/distinct"], 3), start_mean(run["response/distinct"], min(width, 3))
    # Where a task has few answers, or a prompt one that is right, to learn it is to say always that.
    varied = at_least(begun, 0.5) & at_least(start_mean(run["response/length"], min(width, 3)), SHORT)
    alike = varied & at_most(distinct, 0.5 * np.fmin(begun, run["prompts/distinct"]))
    repeats = at_least(rise(run, "response/repetition")[0], 0.15) & ~held_out_score_rose(run)
    useless = at_most(score_rise(run)[0], 0.25)
    sure = at_most(left, 0.1) & (varied | useless)
    return levels(
        (sure | alike, WARNING),
        (at_most(left, 0.3) & (alike | repeats), CRITICAL),
        (sure & at_most(left, 0.02), CRITICAL),
    )


def _collapse_evidence(run: Run) -> Sequence[Evidence]:
    return [
        change_evidence(run, "policy/entropy", "nats a token"),
        change_evidence(run, "response/distinct", "share of different answers in a step"),
        change_evidence(run, "response/repetition", "share of 4-grams that the answer said before"),
    ]


def _collapse_causes(run: Run) -> Sequence[Cause]:
    kl_coef, spread = last(run["objective/kl_coef"]), kl_unit(run)
    beside = (
        f"kl_coef is {format_evidence(kl_coef)} beside {format_evidence(spread)}, "
        "the deviation of what it is weighed against"
    )
    bonus = float(run.setting("algorithm.entropy_coef", 0.0))
    return [
        Cause(
            "the KL holds the policy too weakly",
            applicable_texts((kl_coef < 0.02 * spread, beside)),
            applicable_texts((kl_coef > 0.1 * spread, beside)),
            raise_kl(run, 3),
        ),
        Cause(
            "one step was too large, and what it left no longer varies",
            applicable_texts(
                (bool(at_least(run["policy/step_kl"], 0.3).any()), "a step moved more than 0.3 nats a token")
            ),
            applicable_texts(
                (not at_least(run["policy/step_kl"], 0.1).any(), "no step moved more than 0.1 nats a token")
            ),
            scale_setting(run, "optim.learning_rate", 0.2),
        ),
        Cause(
            "nothing pays for variety",
            applicable_texts((bonus == 0, "entropy_coef is 0")),
            applicable_texts((bonus > 0, f"entropy_coef is {bonus:g}")),
            Change("algorithm.entropy_coef", f"{max(0.01, 2 * bonus):g}"),
        ),
    ]


RULES = (
    Rule(
        "policy-collapse",
        "The policy says the same thing again and again.",
        "policy",
        _collapse,
        _collapse_evidence,
        _collapse_causes,
        follows=names(
            "updates-too-large prompts-repeated reward-hacking reward-inverted length-exploitation "
            "missing-ends stale-normaliser sampler-mismatch critic-lagging value-offset"
        ),
    ),
    Rule(
        "kl-runaway",
        "The policy runs away from the reference, for little or nothing.",
        "update",
        _runaway,
        _runaway_evidence,
        _runaway_causes,
        follows=names(
            "updates-too-large reward-hacking reward-inverted policy-collapse entropy-runaway "
            "wrong-reference missing-ends length-exploitation sampler-mismatch reward-shift stale-normaliser "
            "kl-too-tight no-signal prompts-repeated"
        ),
    ),
)
