"""How a score bends as the policy moves away: the form that Gao et al. found for it, fitted to what was measured."""

from dataclasses import dataclass
from math import exp, inf, log
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

LARGEST = 700.0  # the exponential of more is no number
FEWEST = 4  # points at different KL: one more than the form has constants


@dataclass(frozen=True)
class Fit:
    """score = start + d (alpha - beta ln d) with d = sqrt(KL), KL in nats (Gao et al. 2022, arXiv 2210.10760, RL form).

    With beta > 0 the score turns at d = exp(alpha / beta - 1), where it stands beta * d above the start. With beta <= 0
    it has no such peak, and neither has it when that lies beyond all numbers: it rises, or falls from the start on, or
    (beta < 0) falls to the point at that d and rises after it.
    """

    start: float  # the score at no distance; fitted, for the measured one is as noisy as any other
    alpha: float
    beta: float
    peak_kl: float | None
    peak_score: float | None
    residual: float  # root mean square of what the form leaves, in units of the score

    @classmethod
    def from_coefficients(cls, start: float, alpha: float, beta: float, residual: float) -> Self:
        exponent = 2 * (alpha / beta - 1) if beta > 0 else inf
        if exponent > LARGEST:
            return cls(start, alpha, beta, None, None, residual)
        return cls(start, alpha, beta, exp(exponent), start + beta * exp(exponent / 2), residual)

    def predict(self, kl: float) -> float:
        """The score that the form has at this KL, not negative."""
        distance = kl**0.5
        return self.start + (distance * (self.alpha - self.beta * log(distance)) if distance else 0.0)

    def slope(self, kl: float) -> float:
        """What the score gains by another unit of d at this KL, which is above zero."""
        return self.alpha - self.beta * (1 + log(kl) / 2)

    def is_behind(self, kl: float) -> bool:
        """Whether the score falls at this KL: its highest point, be it the start, lies behind. Nothing does at KL 0."""
        return kl > 0 and self.slope(kl) < 0


def fit_overoptimisation(kl: ArrayLike, score: ArrayLike) -> Fit | None:
    """Least squares over points [M]: the mean KL of some answers to the start, and their mean score.

    None with fewer than four different KL, which would fit anything. A KL below zero, as a sample's may be, counts as
    zero; points with a figure that is not finite are left out.
    """
    distance = np.sqrt(np.clip(np.asarray(kl, dtype=np.float64), 0.0, None))
    wanted = np.asarray(score, dtype=np.float64)
    known = np.isfinite(distance) & np.isfinite(wanted)
    distance, wanted = distance[known], wanted[known]
    if len(np.unique(distance)) < FEWEST:
        return None
    bend = distance * np.log(np.where(distance > 0, distance, 1.0))
    terms = np.stack([np.ones_like(distance), distance, -bend], axis=1)
    coefficients, _, rank, _ = np.linalg.lstsq(terms, wanted, rcond=None)
    if rank < terms.shape[1]:
        return None
    residual = float(np.sqrt(np.mean((terms @ coefficients - wanted) ** 2)))
    start, alpha, beta = coefficients.tolist()
    return Fit.from_coefficients(start, alpha, beta, residual)
