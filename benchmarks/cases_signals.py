"""What the score says of two answers to a prompt, and what the policy is taught about them: python cases_signals.py RUN

For runs with several answers to a prompt. By thirds of the run: how far the scores of two answers to a prompt are apart
(the median); of the pairs that the score tells apart, the share that the objective (score less kl_coef times the KL of
the answer) puts the other way round; and the rank correlation of an answer's mean advantage with its score, and with
its objective, over the answers of which advantages are logged.
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
    """Of the pairs of answers to one prompt: how far apart they score, and the share that the objective turns."""
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["step"], row["prompt"]].append(row)
    pairs = [(a, b) for group in groups.values() for a, b in combinations(group, 2) if a["score"] != b["score"]]
    turned = fmean((a["score"] > b["score"]) != (a["objective"] > b["objective"]) for a, b in pairs)
    return median(abs(a["score"] - b["score"]) for a, b in pairs), turned


def correlation(rows: list[Row], name: str) -> float:
    """Spearman's, over answers that differ."""
    ranks = [np.argsort(np.argsort([row[key] for row in rows])) for key in ("advantage", name)]
    return float(np.corrcoef(*ranks)[0, 1])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
