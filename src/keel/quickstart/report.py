"""Show the result of `keel quickstart`: a table, responses of both policies, and curves."""

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


def print_comparison(metrics: Mapping[str, Any], algorithm: str) -> None:
    """Print the metrics of SFT model and policy side by side, and the win rate with its 95% interval."""
    table = Table("on held-out prompts", "SFT", algorithm.upper())
    for title, (name, form) in ROWS.items():
        table.add_row(title, form.format(metrics["against"][name]), form.format(metrics["policy"][name]))
    interval = f"{metrics['win_rate_low']:.1%} to {metrics['win_rate_high']:.1%}"
    table.add_row("gold win rate against SFT", "", f"{metrics['win_rate']:.1%} ({interval})")
    Console(width=100).print(table)


def print_responses(rows: Sequence[Mapping[str, Any]], algorithm: str) -> None:
    """Print prompts with a response of the SFT model and one of the policy."""
    for row in rows:
        print(f"\n{row['prompt']}")
        for title, side in (("SFT", "against"), (algorithm.upper(), "policy")):
            print(f"  {title:<10}[gold {row[f'{side}_scores'][0]:5.2f}] {row[side][0].strip()}")


def draw_curves(root: Path, algorithm: str, path: Path) -> None:
    """Draw six curves of the run as a PNG. The gold score is computed here, from the logged responses."""
    import matplotlib

    matplotlib.use("Agg")  # draws without a display
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
    canvas, axes = pyplot.subplots(2, 3, figsize=(12, 6.5), layout="constrained")
    for axis, (title, (steps, values)) in zip(axes.flat, curves.items(), strict=True):
        axis.plot(steps, values, color="#1f6f8b", linewidth=1.6)
        axis.set_title(title, fontsize=11, loc="left")
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    canvas.savefig(path, dpi=110)
    pyplot.close(canvas)


def gold_by_step(path: Path) -> tuple[list[int], list[float]]:
    """Return steps and mean gold score of the responses logged in each."""
    scores: dict[int, list[float]] = defaultdict(list)
    for row in read_lines(path):
        scores[row["step"]].append(gold_score(row["prompt"], row["response"]))
    return list(scores), [statistics.fmean(values) for values in scores.values()]


def series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return steps and values of the rows that have this metric."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]
