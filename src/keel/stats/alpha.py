"""Krippendorff's alpha: the reliability of the values that several coders gave to the same units.

Krippendorff 2011, "Computing Krippendorff's alpha-reliability". Shapes: V distinct values, U units, M coders, G groups.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def coincidences(values: Array, groups: Array, num_groups: int) -> tuple[Array, Array]:
    """Count how often two values occur at the same unit.

    A unit of m values adds 1 / (m - 1) for each of its ordered pairs. A unit of one value adds nothing. The sum of the
    matrices over the groups is the coincidence matrix of Krippendorff's section C.

    Args:
        values: [U, M], NaN where a coder gave none.
        groups: [U], the number of each unit's group.

    Returns one matrix a group [G, V, V], and the distinct values in ascending order [V].
    """
    present = ~np.isnan(values)
    sizes = present.sum(1)
    present &= (sizes > 1)[:, None]
    levels, inverse = np.unique(values[present], return_inverse=True)
    codes = np.zeros(values.shape, dtype=int)
    codes[present] = inverse
    width = len(levels)
    matrix = np.zeros(num_groups * width * width)
    for a in range(values.shape[1]):
        for b in range(values.shape[1]):
            both = present[:, a] & present[:, b] if a != b else np.zeros(len(values), dtype=bool)
            cells = (groups[both] * width + codes[both, a]) * width + codes[both, b]
            np.add.at(matrix, cells, 1 / (sizes[both] - 1))  # `matrix[cells] +=` would count repeated cells once
    return matrix.reshape(num_groups, width, width), levels


def alpha(matrix: Array, scale: Array) -> Array:
    """Compute 1 - observed / expected disagreement. [..., V, V], [..., V] -> [...]

    1 is perfect agreement, 0 is the agreement of chance, and below 0 is worse than chance. The disagreement of two
    values is the squared difference of their positions on `scale`: the values themselves for the interval metric,
    `ordinal_scale` for the ordinal metric. NaN unless at least two different values occur.
    """
    counts = matrix.sum(-1)
    total = counts.sum(-1)
    squares = (counts * scale**2).sum(-1)
    products = np.einsum("...c,...ck,...k->...", scale, matrix, scale)
    expected = total * squares - (counts * scale).sum(-1) ** 2
    values_differ = expected > 1e-9 * total * squares  # less is rounding
    ratio = (total - 1) * (squares - products) / np.where(values_differ, expected, 1.0)
    return np.where(values_differ, 1 - ratio, np.nan)


def ordinal_scale(matrix: Array) -> Array:
    """Return the mean position of each value among all values. [..., V, V] -> [..., V]

    The squared difference of two positions is the ordinal metric, (sum_{g=c..k} n_g - (n_c + n_k) / 2)^2.
    """
    counts = matrix.sum(-1)
    return counts.cumsum(-1) - counts / 2
