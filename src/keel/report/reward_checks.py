"""What a reward model is right about, what it is wrong about, and whether its scores mean what they say."""

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
from keel.stats import preference_metrics as judging
from keel.stats.preference_metrics import Numbers, Pairs
from keel.stats.ranks import mean_ranks

MATCHED = 0.1  # lengths that differ by less than this share count as equal
MISTAKES = 20
MIN_PAIRS = 20  # a group of fewer says nothing


@dataclass(frozen=True)
class HeldOut:
    """The held-out rankings of a run, and what its reward model said of them."""

    rankings: list[Ranking]
    scores: list[list[float]]
    member_scores: list[list[list[float]]]  # of an ensemble: for each ranking [members][responses]; else empty

    @classmethod
    def read(cls, run: Path) -> Self:
        """Raises DataError when the run has none."""
        path = run / HELD_OUT_FILE
        try:
            rows = [json.loads(line) for line in read_regular(path).splitlines()]  # texts know other line ends
        except (OSError, ValueError) as error:
            raise DataError("the held-out scores cannot be read", where=str(path)) from error
        names = ("margin", "weight", "rater", "source")
        return cls(
            [
                Ranking(row["prompt"], tuple(row["responses"]), tuple(row["ranks"]), *(row[name] for name in names))
                for row in rows
            ],
            [row["scores"] for row in rows],
            [row["member_scores"] for row in rows if "member_scores" in row],
        )

    @property
    def pairs(self) -> Pairs:
        return judging.build_pairs(self.scores, self.rankings)


@dataclass(frozen=True)
class Group:
    """Some of the pairs, and how many of them are in the right order."""

    name: str
    pairs: int
    accuracy: float
    low: float
    high: float


def group(name: str, held_out: HeldOut, pairs: Pairs, chosen: Any) -> Group | None:
    """None when there are too few to say anything."""
    if np.count_nonzero(chosen) < MIN_PAIRS:
        return None
    some = pairs.where(chosen)
    low, high = judging.accuracy_interval(some, held_out.rankings)
    return Group(name, int(np.count_nonzero(chosen)), judging.accuracy(some), low, high)


def accuracy_groups(held_out: HeldOut) -> dict[str, list[Group]]:
    """Accuracy by what tells the pairs apart; groups that are too small are left out."""
    pairs = held_out.pairs
    found = {
        "how far apart people put them": _by_rank_distance(held_out, pairs),
        "how sure the model is": _by_confidence(pairs),
        "length": _by_length(held_out, pairs),
        "source": _by_name([ranking.source for ranking in held_out.rankings], pairs),
        "rater": _by_name([ranking.rater for ranking in held_out.rankings], pairs),
        "disagreement of the members": _by_disagreement(held_out, pairs),
    }
    made = {
        title: [made for name, chosen in parts.items() if (made := group(name, held_out, pairs, chosen))]
        for title, parts in found.items()
    }
    return {title: rows for title, rows in made.items() if len(rows) > 1}


def pair_lengths(held_out: HeldOut, pairs: Pairs) -> tuple[Numbers, Numbers]:
    """Characters of the better and of the worse answer of each pair. -> [M], [M]"""
    rows = zip(pairs.rankings, pairs.places, strict=True)
    table = [[len(held_out.rankings[n].responses[i]) for i in places] for n, places in rows]
    better, worse = np.array(table, dtype=np.float64).reshape(-1, 2).T
    return better, worse


def similar_lengths(held_out: HeldOut, pairs: Pairs) -> Any:
    """True for pairs of nearly equal length. -> [M] bool"""
    better, worse = pair_lengths(held_out, pairs)
    return np.abs(better - worse) <= MATCHED * np.maximum(better, worse)


def length_correlation(held_out: HeldOut) -> float:
    """Mean Spearman correlation of score and length among the answers to one prompt; nan where there is none."""
    found = [
        np.corrcoef(
            mean_ranks(np.array(scores)), mean_ranks(np.array([len(response) for response in ranking.responses]))
        )[0, 1]
        for scores, ranking in zip(held_out.scores, held_out.rankings, strict=True)
        if len(set(scores)) > 1 and len({len(response) for response in ranking.responses}) > 1
    ]
    return float(np.mean(found)) if found else float("nan")


def mistakes(held_out: HeldOut) -> list[dict[str, Any]]:
    """The pairs that the model is surest of and gets wrong, surest first, at most one of a ranking."""
    pairs = held_out.pairs
    found: dict[int, dict[str, Any]] = {}
    for place in np.argsort(pairs.differences):
        number, (better, worse) = int(pairs.rankings[place]), pairs.places[place]
        if pairs.differences[place] >= 0 or len(found) == MISTAKES:
            break
        ranking = held_out.rankings[number]
        found.setdefault(
            number,
            {
                "prompt": content_text(ranking.prompt),
                "better": ranking.responses[better],
                "worse": ranking.responses[worse],
                "confidence": float(1 / (1 + np.exp(pairs.differences[place]))),
                "rater": ranking.rater,
            },
        )
    return list(found.values())


def _by_rank_distance(held_out: HeldOut, pairs: Pairs) -> dict[str, Any]:
    ranks = [ranking.ranks for ranking in held_out.rankings]
    rows = zip(pairs.rankings, pairs.places, strict=True)
    apart = np.array([ranks[n][worse] - ranks[n][better] for n, (better, worse) in rows])
    return {"1 rank": apart == 1, "2 ranks": apart == 2, "3 ranks and more": apart >= 3}


def _by_confidence(pairs: Pairs) -> dict[str, Any]:
    size = np.abs(pairs.differences)
    cuts = np.quantile(size, [0.25, 0.5, 0.75])
    part = np.searchsorted(cuts, size, side="left")
    names = ("least sure quarter", "second quarter", "third quarter", "surest quarter")
    return {name: part == number for number, name in enumerate(names)}


def _by_length(held_out: HeldOut, pairs: Pairs) -> dict[str, Any]:
    better, worse = pair_lengths(held_out, pairs)
    near = similar_lengths(held_out, pairs)
    return {
        "the better answer is longer": (better > worse) & ~near,
        f"of like length (within {MATCHED:.0%})": near,
        "the better answer is shorter": (better < worse) & ~near,
    }


def _by_name(names: Sequence[str], pairs: Pairs) -> dict[str, Any]:
    own = np.array(names)[pairs.rankings]
    return {name or "not said": own == name for name in sorted(set(names))}


def _by_disagreement(held_out: HeldOut, pairs: Pairs) -> dict[str, Any]:
    """Quarters by the deviation of the members' differences."""
    if not held_out.member_scores:
        return {}
    members = [np.array(rows) for rows in held_out.member_scores]
    rows = zip(pairs.rankings, pairs.places, strict=True)
    deviation = np.array([(members[n][:, i] - members[n][:, j]).std() for n, (i, j) in rows])
    part = np.searchsorted(np.quantile(deviation, [0.25, 0.5, 0.75]), deviation, side="left")
    names = ("quarter with the least", "second quarter", "third quarter", "quarter with the most")
    return {name: part == number for number, name in enumerate(names)}
