"""The win rate of one policy over another, controlled for the length of the responses."""

import torch
from torch import Tensor

from keel.core.masked import check_shapes

# In comparisons. Keeps the coefficients finite where one side wins all, or where length alone decides who wins.
RIDGE = 0.01
ROUNDS = 50
LEAST_OVERLAP = 0.05  # share of the comparisons; below it the rate at equal lengths is an extrapolation
LARGEST_STEP = 2.0  # in logits; a full Newton step far from the solution may diverge


def length_controlled_win_rate(wins: Tensor, longer_by: Tensor, weights: Tensor) -> Tensor:
    """Estimate the win rate at equal lengths of both responses. [M], [M], [..., M] -> [...]

    Fits a logistic regression of the preference on a constant and the length difference d,
    P(win) = sigmoid(a + b tanh(d / std(d))), and returns sigmoid(a). This is Dubois et al. 2024 (arXiv 2404.04475)
    without the difficulty of each instruction: `length_controlled_minimal` of their package.

    Args:
        wins: 1 for a win, 1/2 for a tie, 0 for a loss.
        longer_by: d, the length of the policy's response minus that of the other.
        weights: how often each comparison counts; one regression is fitted per row of weights.
    """
    return torch.sigmoid(_fit(wins, _scaled(longer_by), weights)[0])


def length_overlap(longer_by: Tensor, weights: Tensor) -> float:
    """Return the share of comparisons in which the side that is usually longer is not the longer one. [M], [M]

    Below LEAST_OVERLAP the effects of length and of quality cannot be separated.
    """
    shares = [weights[longer_by <= 0].sum(), weights[longer_by >= 0].sum()]
    return float(torch.stack(shares).min() / weights.sum())


def length_controlled_deviation(wins: Tensor, longer_by: Tensor, weights: Tensor, clusters: Tensor) -> float:
    """Return the standard deviation of a, the logit of the length-controlled win rate. [M], [M], [M], [M] int

    This is the bias-reduced sandwich estimate CR3, a linearized jackknife over clusters (Bell and McCaffrey 2002).
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
    """Fit a and b by Newton's method, with a ridge penalty. [M], [M], [..., M] -> [...], [...]"""
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
