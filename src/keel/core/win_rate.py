"""How often one policy's answer is preferred to another's, and how often it would be if both were equally long."""

import torch
from torch import Tensor

from keel.core.masked import check_shapes

RIDGE = 0.01  # in comparisons: keeps the coefficients finite where all are won, or length alone tells who wins
ROUNDS = 50
LARGEST_STEP = 2.0  # of Newton's method, in logits: far from the solution a whole step may lead astray


def length_controlled(wins: Tensor, longer_by: Tensor, weights: Tensor) -> Tensor:
    """The win rate that remains when both answers are of one length. [M], [M], [..., M] -> [...]

    Logistic regression of the preference (1 won, 1/2 tied, 0 lost) on a constant and the length difference:
    P(win) = sigmoid(a + b tanh(d / std(d))), of which sigmoid(a) is returned (Dubois et al. 2024, arXiv 2404.04475,
    without the difficulty of each instruction: `length_controlled_minimal` of their package). `longer_by` is d, our
    length minus theirs; `weights` say how often each comparison counts, each row of them for a regression of its own.
    """
    check_shapes(wins, longer_by)
    spread = longer_by.std(correction=0)
    z = torch.tanh(longer_by / spread) if spread > 0 else torch.zeros_like(longer_by)
    a = b = torch.zeros(weights.shape[:-1], dtype=weights.dtype, device=weights.device)
    for _ in range(ROUNDS):
        p = torch.sigmoid(a.unsqueeze(-1) + b.unsqueeze(-1) * z)
        missing, curvature = weights * (wins - p), weights * p * (1 - p)
        ga, gb = missing.sum(-1) - RIDGE * a, missing @ z - RIDGE * b
        aa, ab, bb = curvature.sum(-1) + RIDGE, curvature @ z, curvature @ z**2 + RIDGE
        determinant = aa * bb - ab**2
        step = torch.stack([(bb * ga - ab * gb) / determinant, (aa * gb - ab * ga) / determinant])
        step = step.clamp(-LARGEST_STEP, LARGEST_STEP)
        a, b = a + step[0], b + step[1]
        if bool((step.abs() < 1e-9).all()):
            break
    return torch.sigmoid(a)
