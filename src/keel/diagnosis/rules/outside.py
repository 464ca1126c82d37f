"""Is the reward model asked about answers like those that it was tested on?"""

from collections.abc import Sequence

import numpy as np

from keel.diagnosis.findings import Cause, Change, Evidence
from keel.diagnosis.rule import WARNING, Levels, Rule, applicable_texts, is_now, levels, names, raise_kl
from keel.run.read.run import Run
from keel.run.read.series import at_least, last, trailing_mean, window


def _outside(run: Run) -> Levels:
    trained = [name for name, weight in run.scorer_weights().items() if weight]
    width = window(run)
    shares = [trailing_mean(run[f"outside_range/{name}"], width) for name in trained]
    beyond = [at_least(share, 0.5) for share in shares]
    return levels((np.any(beyond, axis=0) if beyond else np.zeros(len(run.steps), dtype=bool), WARNING))


def _outside_evidence(run: Run) -> Sequence[Evidence]:
    return [
        is_now(run, f"outside_range/{name}", "share of answers scored beyond all held-out answers of the reward model")
        for name, weight in run.scorer_weights().items()
        if weight and run.has(f"outside_range/{name}")
    ]


def _outside_causes(run: Run) -> Sequence[Cause]:
    return [
        Cause(
            "the policy gives answers better, or odder, than any that people have judged",
            ("the reward model was never asked about scores like these",),
            (),
            Change("rewards", "collect rankings of this run's answers (keel sample, keel rank) and train it again"),
        ),
        Cause(
            "the KL holds the policy too weakly",
            applicable_texts(
                (last(run["objective/kl"]) > 10, f"the KL is {last(run['objective/kl']):.3g} nats an answer")
            ),
            applicable_texts(
                (last(run["objective/kl"]) < 5, f"the KL is {last(run['objective/kl']):.3g} nats an answer")
            ),
            raise_kl(run, 2),
        ),
    ]


RULES = (
    Rule(
        "reward-out-of-range",
        "Most answers score beyond everything that the reward model was tested on.",
        "reward model",
        _outside,
        _outside_evidence,
        _outside_causes,
        follows=names("reward-hacking reward-shift updates-too-large length-exploitation prompts-repeated"),
    ),
)
