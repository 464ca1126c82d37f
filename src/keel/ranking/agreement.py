"""Agreement between raters, and other statistics of a study: time, position bias, length bias, and raters.

Shapes: I items, R raters, M judgements of one item, U units (one response of one item).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keel.data.turn_text import content_text
from keel.ranking import consensus
from keel.ranking.judgements import Item, Judgement
from keel.stats.alpha import alpha, coincidences, ordinal_scale
from keel.stats.bootstrap import Resamples
from keel.stats.ranks import mean_ranks

Array = NDArray[Any]
ByItem = Mapping[int, Sequence[Judgement]]

MAX_DISAGREEMENTS = 20
"""Items that are reported as those with the least agreement."""


@dataclass(frozen=True)
class PairCounts:
    """Counts of response pairs per item and rater. Each share that is reported is a ratio of two sums of these."""

    compared: Array  # [I, R], pairs that this rater and another one ordered without a tie, once per other rater
    same: Array  # [I, R], of `compared`: in the same order
    distinguished: Array  # [I, R], pairs that this rater ordered without a tie
    earlier: Array  # [I, R], of `distinguished`: won by the response shown first
    unequal: Array  # [I, R], of `distinguished`: the texts differ in length
    longer: Array  # [I, R], of `unequal`: won by the longer text
    ranked: Array  # [I, R], pairs that this rater ranked, ties included


def summary(
    judgements: Sequence[Judgement],
    items: Sequence[Item],
    raters: Sequence[str],
    overlap: int,
    judges: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Compute all statistics of a study as plain values, with None where there is too little data.

    They are those of the people. Each judge is compared with the people separately.

    Shares are over pairs of responses that raters ordered without a tie. A rater who ties a pair or leaves one of its
    responses out does not count for it. Intervals are 95%, from a bootstrap over items.

    Args:
        judgements: The judgements of the study.
        items: All its items, ranked or not.
        raters: Names of all people.
        overlap: Number of raters that each item needs.
        judges: Name of each judge -> `model`, the name of its model.
    """
    everything, judges = judgements, judges or {}
    judgements = [judgement for judgement in everything if judgement.rater not in judges]
    rows = {item.number: row for row, item in enumerate(items)}
    columns = {name: column for column, name in enumerate(raters)}
    by_item: dict[int, list[Judgement]] = {item.number: [] for item in items}
    for judgement in judgements:
        by_item[judgement.item.number].append(judgement)
    counts = _count_pairs(by_item, rows, columns)
    samples = Resamples.draw(len(items))
    # Each comparison of two raters is counted once for each of them.
    agreement = _share(counts.same.sum(1) / 2, counts.compared.sum(1) / 2, samples)
    seconds = [judgement.seconds for judgement in judgements]
    num_ranked = {number: sum(judgement.ranks is not None for judgement in made) for number, made in by_item.items()}
    return {
        "items": len(items),
        "overlap": overlap,
        "judgements": len(judgements),
        "complete": sum(len(by_item[item.number]) >= overlap for item in items),
        "ranked": sum(num_ranked[item.number] >= overlap for item in items),
        "cannot_judge": sum(judgement.ranks is None for judgement in judgements),
        "seconds": {"median": _median(seconds), "total": float(sum(seconds))},
        "alpha": _alpha_with_interval(items, by_item, samples),
        "agreement": agreement,
        "position": _share(counts.earlier.sum(1), counts.distinguished.sum(1), samples),
        "longer": _share(counts.longer.sum(1), counts.unequal.sum(1), samples),
        "raters": _rater_rows(judgements, counts, columns, samples),
        "disagreements": _disagreement_rows(by_item, items, counts),
        "judges": [
            _judge_row(name, about, judgements, everything, (rows, columns), samples) for name, about in judges.items()
        ],
    }


def rank_positions(items: Sequence[Item], by_item: ByItem) -> tuple[Array, Array]:
    """Convert rankings to the units and values from which Krippendorff's alpha is computed.

    A unit is one response of an item. Its value is its position in a rater's order, from 0 (best) to 1: its mean rank
    over the number of responses ranked plus one, where tied responses share the mean of their places.

    Ranks themselves are not comparable. The rank after a tie for first place is 2 or 3 by convention, and a rater who
    leaves responses out uses fewer ranks. If the responses left out are random, the position is the expected one among
    all.

    With these positions each order has the same values. For complete orders by two raters, alpha is then their mean
    rank correlation (Spearman). For two responses it is 2 * agreement - 1. Both hold up to a term of
    1 / (number of values).

    Returns:
        Values [U, M], NaN = not ranked, and for each unit the index of its item [U].
    """
    width = max(map(len, by_item.values()), default=0)
    values, item_indices = [np.empty((0, width))], [np.empty(0, dtype=int)]
    for index, item in enumerate(items):
        positions = np.full((len(item.responses), width), np.nan)
        for column, judgement in enumerate(by_item[item.number]):
            ranks = _ranks(judgement)
            positions[:, column] = mean_ranks(ranks) / ((~np.isnan(ranks)).sum() + 1)
        values.append(positions)
        item_indices.append(np.full(len(positions), index))
    # Rounded, so that equal positions from different divisions are one value of the ordinal scale.
    return np.concatenate(values).round(9), np.concatenate(item_indices)


def _alpha_with_interval(items: Sequence[Item], by_item: ByItem, samples: Resamples) -> dict[str, float | None]:
    several = [row for row, item in enumerate(items) if len(by_item[item.number]) > 1]
    values, item_indices = rank_positions([items[row] for row in several], by_item)
    units = samples.units[several][item_indices] if several else item_indices
    matrices = coincidences(values, units, samples.drawn.shape[1])[0]
    total = matrices.sum(0)
    has_interval = matrices.any((1, 2)).sum() > 1  # with one item, each resample is the same
    drawn = (
        (samples.drawn @ matrices.reshape(len(matrices), -1)).reshape(-1, *total.shape)
        if has_interval
        else total[None][:0]
    )
    return {"value": _number(alpha(total, ordinal_scale(total))), **_interval(alpha(drawn, ordinal_scale(drawn)))}


def _count_pairs(
    by_item: Mapping[int, Sequence[Judgement]], rows: Mapping[int, int], columns: Mapping[str, int]
) -> PairCounts:
    counts = PairCounts(*(np.zeros((len(rows), len(columns))) for _ in range(7)))
    for number, judgements in by_item.items():
        if not judgements:
            continue
        row, raters = rows[number], [columns[judgement.rater] for judgement in judgements]
        orders = np.array([_pair_orders(_ranks(judgement)) for judgement in judgements])  # [M, pairs]
        signs = np.nan_to_num(orders)  # 0 = a tie, or not ranked
        lengths = np.array([len(response) for response in judgements[0].item.responses], dtype=float)
        longer = -_pair_orders(lengths)
        shown = np.array([_pair_orders(np.argsort(judgement.shown).astype(float)) for judgement in judgements])
        distinguished = np.abs(signs)
        # Of two raters: pairs that both ordered, and those in the same order minus those in the opposite order. [M, M]
        shared, net = distinguished @ distinguished.T, signs @ signs.T
        num_distinguished = distinguished.sum(1)
        # The diagonal compares each rater with themselves, so it is subtracted.
        counts.compared[row, raters] = shared.sum(1) - num_distinguished
        counts.same[row, raters] = ((shared + net) / 2).sum(1) - num_distinguished
        counts.distinguished[row, raters] = num_distinguished
        counts.earlier[row, raters] = (signs * shown > 0).sum(1)
        counts.unequal[row, raters] = (signs * longer != 0).sum(1)
        counts.longer[row, raters] = (signs * longer > 0).sum(1)
        counts.ranked[row, raters] = (~np.isnan(orders)).sum(1)
    return counts


def _pair_orders(values: Array) -> Array:
    """For each pair i < j return 1 if value i is lower, -1 if value j is, 0 if equal, NaN if one is missing."""
    first, second = _pair_indices(len(values))
    return np.sign(values[second] - values[first])


@cache
def _pair_indices(count: int) -> tuple[Array, Array]:
    first, second = np.triu_indices(count, 1)
    return first, second


def _ranks(judgement: Judgement) -> Array:
    """Return the ranks as floats, NaN = not ranked."""
    return np.array(judgement.ranks or [None] * len(judgement.item.responses), dtype=float)


def _rater_rows(
    judgements: Sequence[Judgement], counts: PairCounts, columns: Mapping[str, int], samples: Resamples
) -> list[dict[str, Any]]:
    weights = consensus.fit_consensus(judgements).weights
    by_rater = defaultdict(list)
    for judgement in judgements:
        by_rater[judgement.rater].append(judgement)
    return [
        _rater_row(name, by_rater[name], counts, column, samples) | {"weight": weights.get(name)}
        for name, column in columns.items()
    ]


def _rater_row(
    name: str, made: Sequence[Judgement], counts: PairCounts, column: int, samples: Resamples
) -> dict[str, Any]:
    sums = {field: float(values[:, column].sum()) for field, values in vars(counts).items()}
    return {
        "name": name,
        "done": len(made),
        "cannot_judge": sum(judgement.ranks is None for judgement in made),
        "median_seconds": _median([judgement.seconds for judgement in made]),
        "ties": _ratio(sums["ranked"] - sums["distinguished"], sums["ranked"]),
        "agreement": _share(counts.same[:, column], counts.compared[:, column], samples),
        "position": _ratio(sums["earlier"], sums["distinguished"]),
        "longer": _ratio(sums["longer"], sums["unequal"]),
    }


def _judge_row(
    name: str,
    about: Mapping[str, Any],
    people: Sequence[Judgement],
    everything: Sequence[Judgement],
    indices: tuple[Mapping[int, int], Mapping[str, int]],
    samples: Resamples,
) -> dict[str, Any]:
    """Compare one judge with the people, and not with other judges.

    A judge has no time, and no position: it compares in both orders, or in an order of its own.
    """
    rows, columns = indices
    made = [judgement for judgement in everything if judgement.rater == name]
    by_item: dict[int, list[Judgement]] = defaultdict(list)
    for judgement in (*people, *made):
        by_item[judgement.item.number].append(judgement)
    counts = _count_pairs(by_item, rows, {**columns, name: len(columns)})
    row = _rater_row(name, made, counts, len(columns), samples)
    row["weight"] = consensus.fit_consensus([*people, *made]).weights.get(name)
    kept = ("name", "done", "ties", "agreement", "longer", "weight")
    return {"model": about["model"], **{field: row[field] for field in kept}}


def _disagreement_rows(by_item: ByItem, items: Sequence[Item], counts: PairCounts) -> list[dict[str, Any]]:
    """Return the items on which raters differ: the lowest agreement first, then the most pairs."""
    same, compared = counts.same.sum(1) / 2, counts.compared.sum(1) / 2
    disputed = [row for row in range(len(items)) if same[row] < compared[row]]
    disputed.sort(key=lambda row: (same[row] / compared[row], -compared[row], items[row].number))
    return [
        {
            "item": items[row].number,
            "prompt": content_text(items[row].prompt),
            "agreement": float(same[row] / compared[row]),
            "responses": list(items[row].responses),
            "rankings": [
                {"rater": judgement.rater, "ranks": list(judgement.ranks)}
                for judgement in sorted(by_item[items[row].number], key=lambda judgement: judgement.rater)
                if judgement.ranks is not None
            ],
        }
        for row in disputed[:MAX_DISAGREEMENTS]
    ]


def _share(numerators: Array, denominators: Array, samples: Resamples) -> dict[str, Any]:
    """Compute sum(numerators) / sum(denominators) over items, both [I], with its interval."""
    has_interval = (denominators > 0).sum() > 1  # with one item, each resample has the same share
    sums = samples.sums(np.stack([numerators, denominators], 1)) if has_interval else np.empty((0, 2))
    sums = sums[sums[:, 1] > 0]
    drawn = sums[:, 0] / sums[:, 1]
    value = _ratio(numerators.sum(), denominators.sum())
    return {"value": value, **_interval(drawn), "pairs": int(denominators.sum())}


def _interval(drawn: Array) -> dict[str, float | None]:
    drawn = drawn[~np.isnan(drawn)]
    low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (None, None)
    return {"low": _number(low), "high": _number(high)}


def _ratio(numerator: float, denominator: float) -> float | None:
    return float(numerator / denominator) if denominator else None


def _number(value: Any) -> float | None:
    return None if value is None or np.isnan(value) else float(value)


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None
