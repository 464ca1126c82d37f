"""What the best of n answers are worth: by the scorer that chose them, and by those that did not."""

from typing import Any

import torch

from keel.core.best_of import best_of_kl, best_of_weights
from keel.train.comparing import Judged, ratio_intervals, with_intervals


def best_of_curve(judged: Judged, most: int, seed: int) -> list[dict[str, Any]]:
    """For n = 1 .. most the figures of the answer with the highest score of n, with intervals over prompts.

    `kl_bound` is how far it lies at most from the policy that answered, in nats. A scorer that did not choose shows
    what the choice is worth: where its figure falls while the score rises, the score is over-optimised. A prompt of
    which an answer has no score is left out, for the best of fewer answers is less; `prompts` is how many there are.
    Empty without any.
    """
    scored = judged.measured["score"].isfinite().all(1).nonzero().flatten().tolist()
    if not scored:
        return []
    judged = judged.rows(scored)
    names = [name for name in judged.measured if name in ("score", "length") or name.startswith("rewards/")]
    values = {name: judged.measured[name] for name in names}
    above, below = [], []
    for n in range(1, most + 1):
        weights = best_of_weights(judged.measured["score"], n)
        above += [(weights * known.nan_to_num()).sum(1) for known in values.values()]
        below += [(weights * known.isfinite()).sum(1) for known in values.values()]
    tops, bottoms = torch.stack(above, 1), torch.stack(below, 1)
    figures = (tops.sum(0) / bottoms.sum(0)).tolist()
    intervals = ratio_intervals(tops, bottoms, seed)
    curve = []
    for n in range(1, most + 1):
        part = slice((n - 1) * len(names), n * len(names))
        found = with_intervals(dict(zip(names, figures[part], strict=True)), intervals[part])
        curve.append({"n": n, "prompts": len(scored), "kl_bound": best_of_kl(n), **found})
    return curve


def worth_best_of(score: float, curve: list[dict[str, Any]]) -> int | None:
    """The least n whose best answer has at least this score; None where no n of the curve has."""
    return next((point["n"] for point in curve if point["score"] >= score), None)
