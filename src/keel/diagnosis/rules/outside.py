"""Are the responses like those on which the reward model was tested?"""

from collections.abc import Sequence

import numpy as np

from keel.diagnosis.advice import raise_kl
from keel.diagnosis.evidence import applicable_texts, current_evidence
from keel.diagnosis.findings import Cause, Change, Evidence
from keel.diagnosis.rule import (
    MEASURED_IN_ZOO,
    WARNING,
    Bounds,
    Documentation,
    Levels,
    Rule,
    levels,
    rule_names,
    threshold,
)
from keel.run.read.run import Run
from keel.run.read.series import at_least, last, trailing_mean, window

OUTSIDE = 0.5  # of the responses


def _outside_levels(run: Run) -> Levels:
    trained = [name for name, weight in run.scorer_weights().items() if weight]
    shares = [trailing_mean(run[f"outside_range/{name}"], window(run)) for name in trained]
    beyond = [at_least(share, OUTSIDE) for share in shares]
    return levels((np.any(beyond, axis=0) if beyond else np.zeros(len(run.steps), dtype=bool), WARNING))


def _outside_evidence(run: Run) -> Sequence[Evidence]:
    return [
        current_evidence(run, f"outside_range/{name}", "share of responses that score beyond all held-out responses")
        for name, weight in run.scorer_weights().items()
        if weight and run.has(f"outside_range/{name}")
    ]


def _outside_causes(run: Run) -> Sequence[Cause]:
    kl = last(run["objective/kl"])
    kl_text = f"the KL is {kl:.3g} nats per response"
    return [
        Cause(
            "the responses are better, or stranger, than any that people have ranked",
            ("the reward model was never tested on such scores",),
            (),
            Change("rewards", "rank responses of this run (keel sample, keel rank) and train the reward model again"),
        ),
        Cause(
            "the KL penalty is too weak",
            applicable_texts((kl > 10, kl_text)),
            applicable_texts((kl < 5, kl_text)),
            raise_kl(run, 2),
        ),
    ]


RULES = (
    Rule(
        "reward-out-of-range",
        "Most responses score beyond the range on which the reward model was tested.",
        "reward model",
        _outside_levels,
        _outside_evidence,
        _outside_causes,
        Documentation(
            measure="mean of `outside_range/NAME` over a window, for each reward model that the policy learns from",
            thresholds=(
                threshold("share of responses beyond all held-out ones", Bounds(warning=OUTSIDE), ">= {:.0%}"),
            ),
            source=MEASURED_IN_ZOO,
        ),
        follows=rule_names("reward-hacking reward-shift updates-too-large length-exploitation prompts-repeated"),
    ),
)
