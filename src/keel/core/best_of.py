"""Best of n: draw n responses and keep the one with the highest score."""

import math

import torch
from torch import Tensor


def best_of_kl(n: int) -> float:
    """Return log n - (n - 1) / n, the largest KL in nats of the best of n from the policy that sampled all n.

    KL(best of n || policy) equals this for scores with a density (Stiennon et al. 2020, appendix G.3). It is smaller
    where single responses have probability or share a score (Beirami et al. 2024, arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n


def best_of_weights(scores: Tensor, n: int) -> Tensor:
    """Return the probability that each of k responses is the best of n drawn without replacement. [N, k] -> [N, k]

    The i-th response from below has C(i - 1, n - 1) / C(k, n), and responses with equal scores share theirs
    (Nakano et al. 2021, arXiv 2112.09332, appendix I). A row sums to 1, so `weights * x` summed over a row is an
    unbiased estimate of x of the best of n. Raises ValueError if a score is NaN, since it has no rank.
    """
    k = scores.shape[1]
    if not 1 <= n <= k:
        raise ValueError(f"best of {n} from {k} responses")
    if bool(scores.isnan().any()):
        raise ValueError("a response has no score")
    by_rank = torch.tensor([math.comb(i, n - 1) / math.comb(k, n) for i in range(k)], dtype=torch.float64)
    ranks = scores.argsort(1).argsort(1)
    equal = (scores.unsqueeze(2) == scores.unsqueeze(1)).double()
    return (equal @ by_rank.to(scores.device)[ranks].unsqueeze(2)).squeeze(2) / equal.sum(2)
