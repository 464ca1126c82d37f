"""Checks of a reward model on held-out rankings: accuracy by group, length bias, and its most confident mistakes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from keel.data.preferences import Ranking
from keel.data.turn_text import content_text
from keel.errors import DataError
from keel.files import read_regular
from keel.run.reward_files import HELD_OUT_FILE
from keel.stats import preference_metrics
from keel.stats.preference_metrics import Numbers, Pairs
from keel.stats.ranks import mean_ranks

SIMILAR_LENGTH = 0.1  # lengths that differ by at most this share of the longer one count as similar
MAX_MISTAKES = 20
MIN_PAIRS = 20  # the accuracy of a smaller group is not informative


@dataclass(frozen=True)
class HeldOutRankings:
    """The held-out rankings of a run, with the scores of its reward model."""

    rankings: list[Ranking]
    scores: list[list[float]]
    member_scores: list[list[list[float]]]  # per ranking: [members][responses]; empty without an ensemble

    @classmethod
    def read(cls, run: Path) -> Self:
        """Read the file of held-out scores in a run folder. Raises DataError."""
        path = run / HELD_OUT_FILE
        try:
            # Bytes, because str.splitlines() also splits at characters that JSON strings may contain, such as U+2028.
            rows = [json.loads(line) for line in read_regular(path).splitlines()]
        except (OSError, ValueError) as error:
            raise DataError(
                "the held-out scores cannot be read", where=str(path), fix="train the reward model again"
            ) from error
        return cls(
            [
                Ranking(
                    prompt=row["prompt"],
                    responses=tuple(row["responses"]),
                    ranks=tuple(row["ranks"]),
                    margin=row["margin"],
                    weight=row["weight"],
                    rater=row["rater"],
                    source=row["source"],
                )
                for row in rows
            ],
            [row["scores"] for row in rows],
            [row["member_scores"] for row in rows if "member_scores" in row],
        )

    @property
    def pairs(self) -> Pairs:
        return preference_metrics.build_pairs(self.scores, self.rankings)


@dataclass(frozen=True)
class GroupAccuracy:
    """Accuracy on a group of pairs, with its 95% interval."""

    name: str
    pairs: int
    accuracy: float
    low: float
    high: float


def group_accuracy(name: str, held_out: HeldOutRankings, pairs: Pairs, mask: Any) -> GroupAccuracy | None:
    """Compute the accuracy on the pairs of a mask [M]. None for fewer than MIN_PAIRS."""
    count = int(np.count_nonzero(mask))
    if count < MIN_PAIRS:
        return None
    group = pairs.where(mask)
    low, high = preference_metrics.accuracy_interval(group, held_out.rankings)
    return GroupAccuracy(name, count, preference_metrics.accuracy(group), low, high)


def accuracy_groups(held_out: HeldOutRankings) -> dict[str, list[GroupAccuracy]]:
    """Compute the accuracy by several properties of the pairs. Small groups are left out."""
    pairs = held_out.pairs
    masks_by_title = {
        "difference in rank": _by_rank_distance(held_out, pairs),
        "confidence of the model": _by_confidence(pairs),
        "length": _by_length(held_out, pairs),
        "source": _by_name([ranking.source for ranking in held_out.rankings], pairs),
        "rater": _by_name([ranking.rater for ranking in held_out.rankings], pairs),
        "disagreement of the members": _by_disagreement(held_out, pairs),
    }
    groups = {
        title: [row for name, mask in masks.items() if (row := group_accuracy(name, held_out, pairs, mask))]
        for title, masks in masks_by_title.items()
    }
    return {title: rows for title, rows in groups.items() if len(rows) > 1}  # a single group is the overall accuracy


def pair_lengths(held_out: HeldOutRankings, pairs: Pairs) -> tuple[Numbers, Numbers]:
    """Return the characters of the better and of the worse response of each pair. -> [M], [M]"""
    rows = zip(pairs.rankings, pairs.places, strict=True)
    table = [[len(held_out.rankings[n].responses[i]) for i in places] for n, places in rows]
    better, worse = np.array(table, dtype=np.float64).reshape(-1, 2).T
    return better, worse


def similar_lengths(held_out: HeldOutRankings, pairs: Pairs) -> Any:
    """Return which pairs have nearly equal lengths. -> [M] bool"""
    better, worse = pair_lengths(held_out, pairs)
    return np.abs(better - worse) <= SIMILAR_LENGTH * np.maximum(better, worse)


def length_correlation(held_out: HeldOutRankings) -> float:
    """Return the mean Spearman correlation of score and length over prompts. NaN if no prompt has both varying."""
    correlations = [
        np.corrcoef(
            mean_ranks(np.array(scores)), mean_ranks(np.array([len(response) for response in ranking.responses]))
        )[0, 1]
        for scores, ranking in zip(held_out.scores, held_out.rankings, strict=True)
        if len(set(scores)) > 1 and len({len(response) for response in ranking.responses}) > 1
    ]
    return float(np.mean(correlations)) if correlations else float("nan")


def mistakes(held_out: HeldOutRankings) -> list[dict[str, Any]]:
    """Return the wrongly ordered pairs with the highest confidence, at most one per ranking."""
    pairs = held_out.pairs
    by_ranking: dict[int, dict[str, Any]] = {}
    for index in np.argsort(pairs.differences):
        number, (better, worse) = int(pairs.rankings[index]), pairs.places[index]
        if pairs.differences[index] >= 0 or len(by_ranking) == MAX_MISTAKES:
            break
        ranking = held_out.rankings[number]
        by_ranking.setdefault(
            number,
            {
                "prompt": content_text(ranking.prompt),
                "better": ranking.responses[better],
                "worse": ranking.responses[worse],
                "confidence": float(1 / (1 + np.exp(pairs.differences[index]))),
                "rater": ranking.rater,
            },
        )
    return list(by_ranking.values())


def _by_rank_distance(held_out: HeldOutRankings, pairs: Pairs) -> dict[str, Any]:
    ranks = [ranking.ranks for ranking in held_out.rankings]
    rows = zip(pairs.rankings, pairs.places, strict=True)
    distance = np.array([ranks[n][worse] - ranks[n][better] for n, (better, worse) in rows])
    return {"1 rank": distance == 1, "2 ranks": distance == 2, "3 ranks or more": distance >= 3}


def _by_confidence(pairs: Pairs) -> dict[str, Any]:
    size = np.abs(pairs.differences)
    cuts = np.quantile(size, [0.25, 0.5, 0.75])
    quarter = np.searchsorted(cuts, size, side="left")
    names = ("least confident quarter", "second quarter", "third quarter", "most confident quarter")
    return {name: quarter == number for number, name in enumerate(names)}


def _by_length(held_out: HeldOutRankings, pairs: Pairs) -> dict[str, Any]:
    better, worse = pair_lengths(held_out, pairs)
    similar = similar_lengths(held_out, pairs)
    return {
        "the better response is longer": (better > worse) & ~similar,
        f"similar length (within {SIMILAR_LENGTH:.0%})": similar,
        "the better response is shorter": (better < worse) & ~similar,
    }


def _by_name(names: Sequence[str], pairs: Pairs) -> dict[str, Any]:
    pair_names = np.array(names)[pairs.rankings]
    return {name or "not known": pair_names == name for name in sorted(set(names))}


def _by_disagreement(held_out: HeldOutRankings, pairs: Pairs) -> dict[str, Any]:
    """Return quarters by the standard deviation of the members' score differences."""
    if not held_out.member_scores:
        return {}
    members = [np.array(rows) for rows in held_out.member_scores]
    rows = zip(pairs.rankings, pairs.places, strict=True)
    deviation = np.array([(members[n][:, i] - members[n][:, j]).std() for n, (i, j) in rows])
    quarter = np.searchsorted(np.quantile(deviation, [0.25, 0.5, 0.75]), deviation, side="left")
    names = ("lowest quarter", "second quarter", "third quarter", "highest quarter")
    return {name: quarter == number for number, name in enumerate(names)}
