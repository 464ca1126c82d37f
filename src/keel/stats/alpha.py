"""Krippendorff's alpha: how reliable the values are that several coders gave to the same units.

Krippendorff 2011, "Computing Krippendorff's alpha-reliability". V distinct values, U units, M coders.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def coincidences(values: Array, groups: Array, num_groups: int) -> tuple[Array, Array]:
    """How often two values stand at the same unit, and the values in order. [U, M], [U] -> [G, V, V], [V]

    NaN is a missing value. A unit of m values gives each of its ordered pairs 1 / (m - 1), to its group's matrix; a
    unit of one value gives nothing. The sum over groups is the coincidence matrix of Krippendorff's section C.
    """
    given = ~np.isnan(values)
    sizes = given.sum(1)
    given &= (sizes > 1)[:, None]
    levels, inverse = np.unique(values[given], return_inverse=True)
    codes = np.zeros(values.shape, dtype=int)
    codes[given] = inverse
    width = len(levels)
    matrix = np.zeros(num_groups * width * width)
    for a in range(values.shape[1]):
        for b in range(values.shape[1]):
            both = given[:, a] & given[:, b] if a != b else np.zeros(len(values), dtype=bool)
            cells = (groups[both] * width + codes[both, a]) * width + codes[both, b]
            np.add.at(matrix, cells, 1 / (sizes[both] - 1))
    return matrix.reshape(num_groups, width, width), levels


def alpha(matrix: Array, scale: Array) -> Array:
    """1 - observed / expected disagreement: 1 is perfect agreement, 0 what chance gives, below 0 worse than chance.

    Two values disagree by the squared difference of their places on `scale`: the values themselves for the interval
    metric, `ordinal_scale` for the ordinal one. NaN where there are no two different values.
    [..., V, V], [..., V] -> [...]
    """
    often = matrix.sum(-1)
    total = often.sum(-1)
    squares = (often * scale**2).sum(-1)
    products = np.einsum("...c,...ck,...k->...", scale, matrix, scale)
    expected = total * squares - (often * scale).sum(-1) ** 2
    apart = expected > 1e-9 * total * squares
    ratio = (total - 1) * (squares - products) / np.where(apart, expected, 1.0)
    return np.where(apart, 1 - ratio, np.nan)


def ordinal_scale(matrix: Array) -> Array:
    """The middle place of each value among all values given: squared differences of these are the ordinal metric,
    (sum_{g=c..k} n_g - (n_c + n_k) / 2)^2. [..., V, V] -> [..., V]"""
    often = matrix.sum(-1)
    return often.cumsum(-1) - often / 2
