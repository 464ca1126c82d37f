"""How far several raters agree, and what else their rankings show: time, favoured places and lengths, each rater."""

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

MOST = 20
"""Items of most disagreement that are told."""


@dataclass(frozen=True)
class Counts:
    """Answer pairs that were told apart. I items, R raters; the shares below are sums of these, divided."""

    compared: Array  # [I, R], by this rater and another one
    same: Array  # [I, R], of them: ordered the same way
    distinguished: Array  # [I, R], by this rater
    earlier: Array  # [I, R], of them: won by the answer shown earlier
    unequal: Array  # [I, R], of `distinguished`: of texts that differ in length
    longer: Array  # [I, R], of them: won by the longer text
    ranked: Array  # [I, R], pairs this rater ranked, tied or not


def summary(
    judgements: Sequence[Judgement], items: Sequence[Item], raters: Sequence[str], overlap: int
) -> dict[str, Any]:
    """All figures as plain values, None where there is too little to say; shares over answer pairs told apart, with
    95% intervals from a bootstrap over items.

    A rater who ties or skips an answer says nothing of its pairs: `agreement` is over the pairs that both told apart.
    """
    rows = {item.number: row for row, item in enumerate(items)}
    columns = {name: column for column, name in enumerate(raters)}
    by_item: dict[int, list[Judgement]] = {item.number: [] for item in items}
    for judgement in judgements:
        by_item[judgement.item.number].append(judgement)
    counts = _count(by_item, rows, columns)
    samples = Resamples.draw(len(items))
    both = _share(counts.same.sum(1) / 2, counts.compared.sum(1) / 2, samples)
    seconds = [judgement.seconds for judgement in judgements]
    return {
        "items": len(items),
        "overlap": overlap,
        "judgements": len(judgements),
        "complete": sum(len(by_item[item.number]) >= overlap for item in items),
        "ranked": sum(sum(word.ranks is not None for word in by_item[item.number]) >= overlap for item in items),
        "cannot_judge": sum(judgement.ranks is None for judgement in judgements),
        "seconds": {"median": _median(seconds), "total": float(sum(seconds))},
        "alpha": _alpha_of(items, by_item, samples),
        "agreement": both,
        "position": _share(counts.earlier.sum(1), counts.distinguished.sum(1), samples),
        "longer": _share(counts.longer.sum(1), counts.unequal.sum(1), samples),
        "raters": _raters(judgements, counts, columns, samples),
        "disagreements": _disagreements(by_item, items, counts),
    }


def rank_positions(items: Sequence[Item], by_item: ByItem) -> tuple[Array, Array]:
    """Units and coders for the alpha of rankings: values [U, M], and the index of each unit's item [U].

    A unit is an answer of an item, and its value the place in its rater's order, from 0 (best) to 1: the mean rank of
    the answers it is tied with, over the number of answers ranked plus one. Ranks as they are would not do: after a
    tie for the first place the next has rank 2 or 3, by convention; and a rater who leaves answers out numbers fewer
    (of a random part of the answers, this is the expected place in the whole). Each order then holds the same places,
    so that for complete orders by two raters alpha is their mean rank correlation (Spearman's), and for two answers
    2 * agreement - 1, both but for a term of 1 / (number of values).
    """
    width = max(map(len, by_item.values()), default=0)
    rows, owners = [np.empty((0, width))], [np.empty(0, dtype=int)]
    for place, item in enumerate(items):
        values = np.full((len(item.responses), width), np.nan)
        for column, judgement in enumerate(by_item[item.number]):
            ranks = _ranks(judgement)
            values[:, column] = mean_ranks(ranks) / ((~np.isnan(ranks)).sum() + 1)
        rows.append(values)
        owners.append(np.full(len(values), place))
    return np.concatenate(rows).round(9), np.concatenate(owners)


def _alpha_of(items: Sequence[Item], by_item: ByItem, samples: Resamples) -> dict[str, float | None]:
    """The ordinal alpha of the rankings, with its interval."""
    several = [row for row, item in enumerate(items) if len(by_item[item.number]) > 1]  # one says nothing of agreement
    values, owners = rank_positions([items[row] for row in several], by_item)
    units = samples.units[several][owners] if several else owners
    matrices = coincidences(values, units, samples.drawn.shape[1])[0]
    whole = matrices.sum(0)
    enough = matrices.any((1, 2)).sum() > 1
    drawn = (
        (samples.drawn @ matrices.reshape(len(matrices), -1)).reshape(-1, *whole.shape) if enough else whole[None][:0]
    )
    return {"value": _number(alpha(whole, ordinal_scale(whole))), **_bounds(alpha(drawn, ordinal_scale(drawn)))}


def _count(by_item: Mapping[int, Sequence[Judgement]], places: Mapping[int, int], columns: Mapping[str, int]) -> Counts:
    counts = Counts(*(np.zeros((len(places), len(columns))) for _ in range(7)))
    for number, judgements in by_item.items():
        if not judgements:
            continue
        row, who = places[number], [columns[judgement.rater] for judgement in judgements]
        orders = np.array([_order(_ranks(judgement)) for judgement in judgements])  # [M, pairs]
        told = np.nan_to_num(orders)
        lengths = np.array([len(response) for response in judgements[0].item.responses], dtype=float)
        longer = -_order(lengths)
        shown = np.array([_order(np.argsort(judgement.shown).astype(float)) for judgement in judgements])
        apart = np.abs(told)
        shared, signed = apart @ apart.T, told @ told.T
        own = apart.sum(1)
        counts.compared[row, who] = shared.sum(1) - own
        counts.same[row, who] = ((shared + signed) / 2).sum(1) - own
        counts.distinguished[row, who] = own
        counts.earlier[row, who] = (told * shown > 0).sum(1)
        counts.unequal[row, who] = (told * longer != 0).sum(1)
        counts.longer[row, who] = (told * longer > 0).sum(1)
        counts.ranked[row, who] = (~np.isnan(orders)).sum(1)
    return counts


def _order(marks: Array) -> Array:
    """Of every two, i < j: 1 where mark i is the lower one, -1 where j is, 0 equal, NaN where one is missing."""
    first, second = _pairs(len(marks))
    return np.sign(marks[second] - marks[first])


@cache
def _pairs(count: int) -> tuple[Array, Array]:
    """Indices i and j of every two, i < j."""
    first, second = np.triu_indices(count, 1)
    return first, second


def _ranks(judgement: Judgement) -> Array:
    """As floats, NaN = not ranked."""
    return np.array(judgement.ranks or [None] * len(judgement.item.responses), dtype=float)


def _raters(
    judgements: Sequence[Judgement], counts: Counts, columns: Mapping[str, int], samples: Resamples
) -> list[dict[str, Any]]:
    weights = consensus.fit_consensus(judgements).weights
    rows, by_rater = [], defaultdict(list)
    for judgement in judgements:
        by_rater[judgement.rater].append(judgement)
    for name, column in columns.items():
        own = by_rater[name]
        sums = {field: float(values[:, column].sum()) for field, values in vars(counts).items()}
        rows.append(
            {
                "name": name,
                "done": len(own),
                "cannot_judge": sum(judgement.ranks is None for judgement in own),
                "median_seconds": _median([judgement.seconds for judgement in own]),
                "ties": _ratio(sums["ranked"] - sums["distinguished"], sums["ranked"]),
                "agreement": _share(counts.same[:, column], counts.compared[:, column], samples),
                "position": _ratio(sums["earlier"], sums["distinguished"]),
                "longer": _ratio(sums["longer"], sums["unequal"]),
                "weight": weights.get(name),
            }
        )
    return rows


def _disagreements(by_item: ByItem, items: Sequence[Item], counts: Counts) -> list[dict[str, Any]]:
    """Items on which raters differ: the least agreement first, then the most pairs."""
    same, compared = counts.same.sum(1) / 2, counts.compared.sum(1) / 2
    found = [place for place in range(len(items)) if same[place] < compared[place]]
    found.sort(key=lambda place: (same[place] / compared[place], -compared[place], items[place].number))
    return [
        {
            "item": items[place].number,
            "prompt": content_text(items[place].prompt),
            "agreement": float(same[place] / compared[place]),
            "responses": list(items[place].responses),
            "rankings": [
                {"rater": judgement.rater, "ranks": list(judgement.ranks)}
                for judgement in sorted(by_item[items[place].number], key=lambda judgement: judgement.rater)
                if judgement.ranks is not None
            ],
        }
        for place in found[:MOST]
    ]


def _share(part: Array, whole: Array, samples: Resamples) -> dict[str, Any]:
    """sum(part) / sum(whole) over items, both [I]."""
    enough = (whole > 0).sum() > 1
    sums = samples.sums(np.stack([part, whole], 1)) if enough else np.empty((0, 2))
    sums = sums[sums[:, 1] > 0]
    drawn = sums[:, 0] / sums[:, 1]
    return {"value": _ratio(part.sum(), whole.sum()), **_bounds(drawn), "pairs": int(whole.sum())}


def _bounds(drawn: Array) -> dict[str, float | None]:
    drawn = drawn[~np.isnan(drawn)]
    low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (None, None)
    return {"low": _number(low), "high": _number(high)}


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def _number(value: Any) -> float | None:
    return None if value is None or np.isnan(value) else float(value)


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None
