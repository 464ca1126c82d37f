"""What `keel quickstart` shows at the end: a table, answers before and after, and the curves."""

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from keel.quickstart.gold import gold_score

ROWS = {
    "gold score": ("score", "{:.2f}"),
    "reward-model score": ("rewards/reward", "{:.2f}"),
    "KL to the SFT model": ("kl", "{:.1f}"),
    "length": ("length", "{:.1f}"),
    "truncated": ("truncated", "{:.1%}"),
}


def print_table(judged: Mapping[str, Any], algorithm: str) -> None:
    """SFT and policy side by side, and the win rate with its 95% interval."""
    table = Table("on held-out prompts", "SFT", algorithm.upper())
    for title, (name, form) in ROWS.items():
        table.add_row(title, form.format(judged["against"][name]), form.format(judged["policy"][name]))
    interval = f"{judged['win_rate_low']:.1%} to {judged['win_rate_high']:.1%}"
    table.add_row("gold win rate against SFT", "", f"{judged['win_rate']:.1%} ({interval})")
    Console(width=100).print(table)


def print_responses(rows: Sequence[Mapping[str, Any]], algorithm: str) -> None:
    """Prompts with an answer before and after."""
    for row in rows:
        print(f"\n{row['prompt']}")
        for title, side in (("SFT", "against"), (algorithm.upper(), "policy")):
            print(f"  {title:<10}[gold {row[f'{side}_scores'][0]:5.2f}] {row[side][0].strip()}")


def draw_curves(root: Path, algorithm: str, path: Path) -> None:
    """Six curves of the run as a PNG. The gold score is judged afterwards, from the answers that the run logged."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    policy = read_lines(root / algorithm / "metrics.jsonl")
    curves = {
        "loss of pre-training": series(read_lines(root / "pretrain/metrics.jsonl"), "sft/loss"),
        "loss of the reward model": series(read_lines(root / "reward/metrics.jsonl"), "reward/loss"),
        f"{algorithm}: gold score (hidden)": gold_by_step(root / algorithm / "rollouts.jsonl"),
        f"{algorithm}: reward-model score": series(policy, "objective/scores"),
        f"{algorithm}: KL to SFT, nats a response": series(policy, "objective/kl"),
        f"{algorithm}: response length, tokens": series(policy, "response/length"),
    }
    metric, axes = pyplot.subplots(2, 3, figsize=(12, 6.5), layout="constrained")
    for axis, (title, (steps, values)) in zip(axes.flat, curves.items(), strict=True):
        axis.plot(steps, values, color="#1f6f8b", linewidth=1.6)
        axis.set_title(title, fontsize=11, loc="left")
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    metric.savefig(path, dpi=110)
    pyplot.close(metric)


def gold_by_step(path: Path) -> tuple[list[int], list[float]]:
    """Mean gold score of each step's logged answers."""
    scores: dict[int, list[float]] = defaultdict(list)
    for row in read_lines(path):
        scores[row["step"]].append(gold_score(row["prompt"], row["response"]))
    return list(scores), [statistics.fmean(values) for values in scores.values()]


def series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the lines that have this metric."""
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]
