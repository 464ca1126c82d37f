"""pass@k: the probability that at least one of k responses is correct."""

import torch
from torch import Tensor


def pass_at_k(num_correct: Tensor, num_samples: Tensor, k: int) -> Tensor:
    """Return an unbiased estimate of pass@k for each prompt, from n >= k responses of which c are correct.

    It is 1 - C(n - c, k) / C(n, k), the share of subsets of k responses with a correct one (Chen et al. 2021, arXiv
    2107.03374, eq. 1). The plug-in estimate 1 - (1 - c / n)^k would be too low.

    Args:
        num_correct: c [N].
        num_samples: n [N].

    Raises ValueError unless 0 <= c <= n and 1 <= k <= n everywhere.
    """
    wrong = num_samples - num_correct
    if k < 1 or bool((num_samples < k).any()) or bool((wrong < 0).any()) or bool((num_correct < 0).any()):
        raise ValueError(f"pass@{k} of c correct responses from n needs 0 <= c <= n and 1 <= k <= n")
    # C(w, k) / C(n, k) is the product of (w - i) / (n - i). It is 0 for w < k: one factor is, and later ones are below.
    failed = torch.ones(wrong.shape, dtype=torch.float64, device=wrong.device)
    for i in range(k):
        failed = failed * ((wrong - i) / (num_samples - i).double()).clamp(min=0.0)
    return 1.0 - failed
