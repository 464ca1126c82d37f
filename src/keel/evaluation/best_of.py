"""Best-of-n curves: metrics of the response with the highest score of n."""

from typing import Any

from keel.core.best_of import best_of_kl, best_of_weights
from keel.evaluation.judged import EvaluatedResponses, interval_entries, sum_by_prompt
from keel.stats.intervals import mean_interval


def best_of_curve(evaluated: EvaluatedResponses, most: int) -> list[dict[str, Any]]:
    """Compute metrics of the response with the highest score of n, for n = 1 .. most, with intervals over prompts.

    `kl_bound` is the upper bound of the KL to the policy that was sampled, in nats. The score is over-optimised where
    it rises with n and another scorer falls. Prompts with a response that has no score are left out: the best of fewer
    responses would be lower. `prompts` is the number of prompts used. Empty without any.
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
        for name, measured in values.items():
            above = sum_by_prompt((weights * measured.nan_to_num()).sum(1), clusters)
            below = sum_by_prompt((weights * measured.isfinite()).sum(1), clusters)
            value = float(above.sum() / below.sum())
            point |= interval_entries(name, value, mean_interval(above.numpy(), below.numpy()))
        curve.append(point)
    return curve


def equivalent_best_of_n(score: float, curve: list[dict[str, Any]]) -> int | None:
    """Return the smallest n whose best response has at least this score; None if no n of the curve has."""
    return next((point["n"] for point in curve if point["score"] >= score), None)
