"""How often one policy's answer is preferred to another's, and how often it would be if both were equally long."""

import torch
from torch import Tensor

from keel.core.masked import check_shapes

RIDGE = 0.01  # in comparisons: keeps the coefficients finite where all are won, or length alone tells who wins
ROUNDS = 50
LEAST_OVERLAP = 0.05  # of the comparisons; with fewer the rate at equal lengths is an extrapolation
LARGEST_STEP = 2.0  # of Newton's method, in logits: far from the solution a whole step may lead astray


def length_controlled_win_rate(wins: Tensor, longer_by: Tensor, weights: Tensor) -> Tensor:
    """The win rate that remains when both answers are of one length. [M], [M], [..., M] -> [...]

    Logistic regression of the preference (1 won, 1/2 tied, 0 lost) on a constant and the length difference:
    P(win) = sigmoid(a + b tanh(d / std(d))), of which sigmoid(a) is returned (Dubois et al. 2024, arXiv 2404.04475,
    without the difficulty of each instruction: `length_controlled_minimal` of their package). `longer_by` is d, our
    length minus theirs; `weights` say how often each comparison counts, each row of them for a regression of its own.
    """
    return torch.sigmoid(_fit(wins, _scaled(longer_by), weights)[0])


def length_overlap(longer_by: Tensor, weights: Tensor) -> float:
    """Return the share of comparisons in which the side that is mostly longer is not the longer one. [M], [M]

    Below LEAST_OVERLAP the effect of length and that of quality cannot be separated.
    """
    shares = [weights[longer_by <= 0].sum(), weights[longer_by >= 0].sum()]
    return float(torch.stack(shares).min() / weights.sum())


def length_controlled_deviation(wins: Tensor, longer_by: Tensor, weights: Tensor, clusters: Tensor) -> float:
    """Return the standard deviation of a, the logit of the length-controlled rate. [M], [M], [M], [M] int

    The bias-reduced sandwich CR3, a linearized jackknife over the clusters (Bell and McCaffrey 2002).
    """
    z = _scaled(longer_by)
    a, b = _fit(wins, z, weights)
    p = torch.sigmoid(a + b * z)
    rows = torch.stack([torch.ones_like(z), z], 1)
    count = int(clusters.max()) + 1
    scores = rows.new_zeros(count, 2).index_add_(0, clusters, (weights * (wins - p)).unsqueeze(1) * rows)
    outer = rows.unsqueeze(2) * rows.unsqueeze(1) * (weights * p * (1 - p)).view(-1, 1, 1)
    curvature = rows.new_zeros(count, 2, 2).index_add_(0, clusters, outer)
    without = curvature.sum(0) - curvature + RIDGE * torch.eye(2, dtype=z.dtype, device=z.device)
    changes = torch.linalg.solve(without, scores.unsqueeze(2))[:, 0, 0]
    return float(((count - 1) / count * changes.square().sum()).sqrt())


def _scaled(longer_by: Tensor) -> Tensor:
    spread = longer_by.std(correction=0)
    return torch.tanh(longer_by / spread) if spread > 0 else torch.zeros_like(longer_by)


def _fit(wins: Tensor, z: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return a and b by Newton's method, with a ridge. [M], [M], [..., M] -> [...], [...]"""
    check_shapes(wins, z)
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
    return a, b
