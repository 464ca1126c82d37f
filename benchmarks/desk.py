"""Shared functions of benchmarks on the quickstart: its language model, its rankings, and its hidden gold score."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from keel.config import EvaluateConfig, QuickstartConfig, TrainConfig, parse
from keel.evaluation.evaluate import evaluate_policies
from keel.quickstart.report import gold_by_step, read_lines, series
from keel.quickstart.run import Quickstart, evaluation_settings, gold, policy_settings, run_reward_stages
from keel.run.folder import write_atomic
from keel.training.policy import train_policy

COLOURS = ("#1f6f8b", "#c8553d", "#588157", "#7b5ea7", "#b38a00")


def prepare(folder: Path, seed: int) -> Quickstart:
    """Make language model, rankings and reward model of the quickstart, unless they exist (a minute)."""
    run = Quickstart(parse(QuickstartConfig, {"output": str(folder), "seed": seed}))
    if not (folder / "reward" / "model").exists():
        run_reward_stages(run)
    return run


def first_rankings(run: Quickstart, count: int, target: Path) -> str:
    lines = (run.root / "rankings.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    write_atomic(target, "".join(lines[:count]))
    return str(target)


def learn_policy(run: Quickstart, output: Path, changes: Mapping[str, Any]) -> None:
    """Train a policy with the quickstart's settings and some changes (sections are merged), unless the run ended."""
    values = policy_settings(run).model_dump()
    for name, value in {**changes, "output": str(output)}.items():
        values[name] = values[name] | value if isinstance(value, Mapping) else value
    if not (output / "policy").exists():
        train_policy(parse(TrainConfig, values), resume=(output / "checkpoints").exists())


def gold_over_kl(output: Path) -> tuple[list[float], list[float], list[float]]:
    """Return KL to the initial model, mean gold score and mean reward-model score of each step."""
    metrics = read_lines(output / "metrics.jsonl")
    return series(metrics, "objective/kl")[1], gold_by_step(output / "rollouts.jsonl")[1], series(
        metrics, "objective/scores"
    )[1]  # fmt: skip


def judged(run: Quickstart, policy: Path) -> dict[str, Any]:
    """Evaluate a policy against the SFT model by gold score on held-out prompts. The result is cached beside it."""
    target = policy.parent / "judged.json"
    if not target.exists():
        settings = evaluation_settings(run).model_dump() | {"policy": str(policy), "output": None}
        figures = evaluate_policies(parse(EvaluateConfig, settings), functions=[gold])
        write_atomic(target, json.dumps(figures, indent=1) + "\n")
    found: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
    return found


def picture(path: Path, labels: tuple[str, str, str], draw: Callable[[Any], None]) -> None:
    """Draw one plot with this title and these axis labels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.6), layout="constrained")
    draw(axis)
    axis.set_title(labels[0], loc="left", fontsize=11)
    axis.set_xlabel(labels[1])
    axis.set_ylabel(labels[2])
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
