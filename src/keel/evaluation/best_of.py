"""What the best of n answers are worth: by the scorer that chose them, and by those that did not."""

from typing import Any

from keel.core.best_of import best_of_kl, best_of_weights
from keel.evaluation.judged import EvaluatedResponses, by_prompt, with_interval
from keel.stats.intervals import mean_interval


def best_of_curve(evaluated: EvaluatedResponses, most: int) -> list[dict[str, Any]]:
    """For n = 1 .. most the figures of the answer with the highest score of n, with intervals over prompts.

    `kl_bound` is how far it lies at most from the policy that answered, in nats. A scorer that did not choose shows
    what the choice is worth: where its figure falls while the score rises, the score is over-optimised. A prompt of
    which an answer has no score is left out, for the best of fewer answers is less; `prompts` is how many there are.
    Empty without any.
    """
    scored = evaluated.measured["score"].isfinite().all(1).nonzero().flatten().tolist()
    if not scored:
        return []
    evaluated = evaluated.rows(scored)
    names = [name for name in evaluated.measured if name in ("score", "length") or name.startswith("rewards/")]
    values = {name: evaluated.measured[name] for name in names}
    clusters = evaluated.clusters
    curve: list[dict[str, Any]] = []
    for n in range(1, most + 1):
        weights = best_of_weights(evaluated.measured["score"], n)
        point: dict[str, Any] = {"n": n, "prompts": len(clusters.unique()), "kl_bound": best_of_kl(n)}
        for name, known in values.items():
            above = by_prompt((weights * known.nan_to_num()).sum(1), clusters)
            below = by_prompt((weights * known.isfinite()).sum(1), clusters)
            value = float(above.sum() / below.sum())
            point |= with_interval(name, value, mean_interval(above.numpy(), below.numpy()))
        curve.append(point)
    return curve


def equivalent_best_of_n(score: float, curve: list[dict[str, Any]]) -> int | None:
    """The least n whose best answer has at least this score; None where no n of the curve has."""
    return next((point["n"] for point in curve if point["score"] >= score), None)
