"""Compare the scores of two responses to a prompt with what the policy learns from them: python cases_signals.py RUN

For runs with several responses to a prompt. For each third of the run it prints: the median difference of the scores of
two responses to a prompt; of the pairs with different scores, the share that the objective (score minus kl_coef times
the KL of the response) orders the other way; and the rank correlation of a response's mean advantage with its score and
with its objective, over the responses with logged advantages.
"""

import json
import sys
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import yaml

Row = dict[str, Any]


def main(folder: Path) -> None:
    kl_coef = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["algorithm"]["kl_coef"]
    rows = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["objective"] = row["score"] - kl_coef * row["kl"]
    last = rows[-1]["step"]
    print(f"{folder}: kl_coef {kl_coef}\n   steps    apart   turned  adv~score  adv~objective")
    for third in range(3):
        first, end = 1 + third * last // 3, (third + 1) * last // 3
        own = [row for row in rows if first <= row["step"] <= end]
        taught = [row | {"advantage": fmean(row["advantages"])} for row in own if "advantages" in row]
        by_score, by_objective = (correlation(taught, name) for name in ("score", "objective"))
        apart, turned = told_apart(own)
        print(f"{first:>4}-{end:<3} {apart:>8.2f} {turned:>8.1%} {by_score:>10.2f} {by_objective:>14.2f}")


def told_apart(rows: list[Row]) -> tuple[float, float]:
    """Return the median score difference of response pairs, and the share of pairs that the objective reorders."""
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["step"], row["prompt"]].append(row)
    pairs = [(a, b) for group in groups.values() for a, b in combinations(group, 2) if a["score"] != b["score"]]
    turned = fmean((a["score"] > b["score"]) != (a["objective"] > b["objective"]) for a, b in pairs)
    return median(abs(a["score"] - b["score"]) for a, b in pairs), turned


def correlation(rows: list[Row], name: str) -> float:
    """Return Spearman's correlation over responses that differ."""
    ranks = [np.argsort(np.argsort([row[key] for row in rows])) for key in ("advantage", name)]
    return float(np.corrcoef(*ranks)[0, 1])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
