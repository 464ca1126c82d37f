"""Over-optimisation: the score as a function of the KL to the start, fitted in the form of Gao et al. 2022."""

from dataclasses import dataclass
from math import exp, inf, log
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

LARGEST = 700.0  # `exp` of a larger number overflows
FEWEST = 4  # points at different KL: one more than the form has coefficients


@dataclass(frozen=True)
class OveroptimisationFit:
    """score = start + d (alpha - beta ln d) with d = sqrt(KL), KL in nats (Gao et al. 2022, arXiv 2210.10760, RL form).

    With beta > 0 the score peaks at d = exp(alpha / beta - 1), beta * d above the start. It has no peak with beta <= 0,
    or where the peak's KL would overflow. Then the score rises, or falls from the start, or (beta < 0) falls to its
    lowest point at that d and then rises.
    """

    start: float  # score at KL 0; fitted, since the measured score of the start is as noisy as the others
    alpha: float
    beta: float
    peak_kl: float | None
    peak_score: float | None
    residual: float  # root mean square residual, in units of the score

    @classmethod
    def from_coefficients(cls, start: float, alpha: float, beta: float, residual: float) -> Self:
        exponent = 2 * (alpha / beta - 1) if beta > 0 else inf
        if exponent > LARGEST:
            return cls(start, alpha, beta, None, None, residual)
        return cls(start, alpha, beta, exp(exponent), start + beta * exp(exponent / 2), residual)

    def predict(self, kl: float) -> float:
        """Return the fitted score at a KL >= 0."""
        distance = kl**0.5
        return self.start + (distance * (self.alpha - self.beta * log(distance)) if distance else 0.0)

    def slope(self, kl: float) -> float:
        """Return the derivative of the score by d at a KL > 0."""
        return self.alpha - self.beta * (1 + log(kl) / 2)

    def is_behind(self, kl: float) -> bool:
        """Whether the score falls at this KL, so that its highest point (maybe the start) is at a smaller KL."""
        return kl > 0 and self.slope(kl) < 0


def fit_overoptimisation(kl: ArrayLike, score: ArrayLike) -> OveroptimisationFit | None:
    """Fit the form by least squares. Return None for fewer than four different KL, which it would fit exactly.

    Args:
        kl: [M], mean KL to the start at each point. The estimate from a sample may be negative, and counts as 0.
        score: [M], mean score at each point.

    Points with a value that is not finite are left out.
    """
    distance = np.sqrt(np.clip(np.asarray(kl, dtype=np.float64), 0.0, None))
    target = np.asarray(score, dtype=np.float64)
    known = np.isfinite(distance) & np.isfinite(target)
    distance, target = distance[known], target[known]
    if len(np.unique(distance)) < FEWEST:
        return None
    log_term = distance * np.log(np.where(distance > 0, distance, 1.0))  # d ln d goes to 0 with d
    terms = np.stack([np.ones_like(distance), distance, -log_term], axis=1)
    coefficients, _, rank, _ = np.linalg.lstsq(terms, target, rcond=None)
    if rank < terms.shape[1]:
        return None
    residual = float(np.sqrt(np.mean((terms @ coefficients - target) ** 2)))
    start, alpha, beta = coefficients.tolist()
    return OveroptimisationFit.from_coefficients(start, alpha, beta, residual)
