"""Is the policy where it may be, and still able to say more than one thing?"""

from collections.abc import Sequence

import numpy as np

from keel.diagnosis.chance import SURE, responses_per_step, score_rise
from keel.diagnosis.findings import Cause, Change, Evidence
from keel.diagnosis.rule import (
    CRITICAL,
    NOTICE,
    USUAL_KL,
    WARNING,
    Levels,
    Rule,
    advantage_deviations,
    applicable_texts,
    change_evidence,
    is_now,
    kl_unit,
    kl_units,
    levels,
    names,
    ratio,
    scale_setting,
    score_deviation,
)
from keel.run.read.run import Run, Series
from keel.run.read.series import at_least, at_most, first, last, rise, start_mean, trailing_mean, window

MANY = 16  # answers, of which one step tells the entropy


def _tight(run: Run) -> Levels:
    spread, kl_coef = kl_units(run), run["objective/kl_coef"]
    target = run.setting("algorithm.target_kl")
    held = np.full(len(run.steps), target is not None and float(target) < 0.1)
    enough = run.steps >= 2
    return levels(
        ((at_least(kl_coef, 3 * spread) & at_least(spread, 1e-6) | held) & enough, WARNING),
        (at_least(kl_coef, 10 * spread) & at_least(spread, 1e-6) & enough, CRITICAL),
    )


def _tight_evidence(run: Run) -> Sequence[Evidence]:
    spread, kl_coef = kl_unit(run), last(run["objective/kl_coef"])
    return [
        Evidence(
            "objective/kl_coef",
            f"{kl_coef:.3g}, where the scores' deviation is {spread:.3g}: the best policy under it is about "
            f"{0.5 * ratio(spread, kl_coef) ** 2:.2g} nats away and {ratio(spread, kl_coef):.2g} deviations better",
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
            applicable_texts((target is not None, f"target_kl is {target} nats an answer")),
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
    """Nats a token lately, and at the start: of the first step, before any update, if that is lower than the mean of
    three and made of enough answers. [S], [S]"""
    entropy = run["policy/entropy"]
    start = start_mean(entropy, 3)
    return trailing_mean(entropy, 3), np.fmin(start_mean(entropy, 1), start) if responses_per_step(
        run
    ) >= MANY else start


def _bonus_outweighs(run: Run) -> bool:
    """Whether what the entropy bonus once had gained would count beside what the score could."""
    entropy, before = _entropies(run)
    bonus = float(run.setting("algorithm.entropy_coef", 0.0))
    return bool(at_least(bonus * (entropy - before), 0.25 * advantage_deviations(run)).any())


def _noise(run: Run) -> Levels:
    entropy, before = _entropies(run)
    bonus = float(run.setting("algorithm.entropy_coef", 0.0)) > 0
    mild = at_least(entropy, 1.75 * before) & at_least(entropy - before, 0.4)
    grave = at_least(entropy, 2.5 * before) & at_least(entropy - before, 1.0)
    sign = mild if bonus else mild & at_most(score_rise(run)[0], 0.25)
    return levels((sign, WARNING), (grave, CRITICAL))


def _noise_evidence(run: Run) -> Sequence[Evidence]:
    return [
        change_evidence(run, "policy/entropy", "nats a token"),
        change_evidence(run, "objective/scores"),
        is_now(run, "policy/step_kl"),
    ]


def _noise_causes(run: Run) -> Sequence[Cause]:
    bonus = float(run.setting("algorithm.entropy_coef", 0.0))
    return [
        Cause(
            "the entropy bonus outweighs the score",
            applicable_texts((bonus > 0, f"entropy_coef is {bonus:g}")),
            applicable_texts((bonus == 0, "entropy_coef is 0")),
            scale_setting(run, "algorithm.entropy_coef", 0.01) if bonus else Change("algorithm.entropy_coef", "0"),
        ),
        Cause(
            "the updates destroy what the policy knew",
            applicable_texts(
                (bool(at_least(run["policy/step_kl"], 0.1).any()), "a step moved more than 0.1 nats a token")
            ),
            applicable_texts(
                (not at_least(run["policy/step_kl"], 0.1).any(), "no step moved more than 0.1 nats a token")
            ),
            scale_setting(run, "optim.learning_rate", 0.2),
        ),
    ]


def _ends(run: Run) -> Levels:
    width = window(run)
    cut, begun = trailing_mean(run["response/truncated"], 3), start_mean(run["response/truncated"], min(width, 3))
    rising = at_least(cut - begun, 0.15) & at_least(rise(run, "response/truncated")[1], SURE)
    # Cut from the first step on may be meant, as for stories without an end; not where ends are paid for.
    meant = WARNING if float(run.setting("reward.missing_eos_penalty", 0.0)) else NOTICE
    return levels((at_least(cut, 0.3), meant), (rising, WARNING), (rising & at_least(cut, 0.5), CRITICAL))


def _ends_evidence(run: Run) -> Sequence[Evidence]:
    limit = run.setting("rollout.max_response_tokens")
    return [
        change_evidence(run, "response/truncated", f"share that met the limit of {limit} tokens"),
        change_evidence(run, "response/length"),
    ]


def _ends_causes(run: Run) -> Sequence[Cause]:
    limit, penalty = run.setting("rollout.max_response_tokens"), float(run.setting("reward.missing_eos_penalty", 0.0))
    from_start = first(trailing_mean(run["response/truncated"], window(run))) > 0.25
    grew = last(rise(run, "response/length")[0]) > 0
    short = Cause(
        "the limit is too short for what the model wants to say",
        applicable_texts((from_start, "answers were cut from the first steps on")),
        applicable_texts((not from_start, "at the start the answers ended by themselves")),
        Change("rollout.max_response_tokens", f"{2 * int(limit)} (it is {limit})" if limit else "twice as many"),
    )
    unpaid = Cause(
        "nothing pays for ending",
        applicable_texts(
            (penalty == 0, "missing_eos_penalty is 0"), (grew and not from_start, "the answers grew until the limit")
        ),
        applicable_texts((penalty > 0, f"missing_eos_penalty is {penalty:g}")),
        Change("reward.missing_eos_penalty", f"{max(score_deviation(run), 2 * penalty):.2g} (it is {penalty:g})"),
    )
    trained = Cause(
        "the model was never taught to end: its supervised data had no end token",
        applicable_texts((from_start, "answers were cut from the first steps on")),
        applicable_texts((not from_start, "at the start the answers ended by themselves")),
        Change("policy.model", "a model of keel sft on completions, which end with the end token"),
    )
    return [short, trained, unpaid] if from_start else [unpaid, short, trained]


ENTROPY = Rule(
    "entropy-runaway",
    "The policy forgets what it knew: its answers become noise.",
    "policy",
    _noise,
    _noise_evidence,
    _noise_causes,
    follows=("updates-too-large", "sampler-mismatch"),
    of_itself=_bonus_outweighs,
)
"""Looked at before the updates, which a bonus makes too large."""
RULES = (
    Rule(
        "kl-too-tight",
        "The KL penalty leaves the policy no room: the best it may become is hardly better than its start.",
        "update",
        _tight,
        _tight_evidence,
        _tight_causes,
        patience=2,
        follows=names("no-signal stale-normaliser policy-collapse updates-too-large"),
    ),
    Rule(
        "missing-ends",
        "Answers are cut at the limit instead of coming to an end.",
        "policy",
        _ends,
        _ends_evidence,
        _ends_causes,
        follows=names("updates-too-large entropy-runaway sampler-mismatch reward-hacking kl-runaway value-offset"),
    ),
)
