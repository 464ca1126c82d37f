"""Best of n: what is won by drawing n answers and keeping the one that a scorer likes best."""

import math

import torch
from torch import Tensor


def best_of_kl(n: int) -> float:
    """log n - (n - 1) / n, in nats: how far the best of n answers lies at most from the policy that gave all n.

    KL(best of n || policy) is this for scores of a density (Stiennon et al. 2020, appendix G.3), and less where single
    answers have probability or share a score (Beirami et al. 2024, arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n


def best_of_weights(scores: Tensor, n: int) -> Tensor:
    """How probably each of k answers is the best of n of them, drawn without replacement. [N, k] -> [N, k]

    C(i - 1, n - 1) / C(k, n) for the i-th from below, so that `weights * x` is an unbiased estimate of x of the best of
    n; answers of equal score share theirs (Nakano et al. 2021, arXiv 2112.09332, appendix I). A row sums to 1. Raises
    ValueError for an answer without a score (nan), which has no place among the others.
    """
    k = scores.shape[1]
    if not 1 <= n <= k:
        raise ValueError(f"best of {n} from {k} answers")
    if bool(scores.isnan().any()):
        raise ValueError("an answer has no score")
    by_place = torch.tensor([math.comb(i, n - 1) / math.comb(k, n) for i in range(k)], dtype=torch.float64)
    places = scores.argsort(1).argsort(1)
    equal = (scores.unsqueeze(2) == scores.unsqueeze(1)).double()
    return (equal @ by_place.to(scores.device)[places].unsqueeze(2)).squeeze(2) / equal.sum(2)
