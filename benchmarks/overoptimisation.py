"""Measure over-optimisation: the gold score over the KL with kl_coef = 0, for a reward model and for ensembles.

It uses the quickstart's example with few rankings.

    python benchmarks/overoptimisation.py runs/overoptimisation --seeds 2 --rankings 150

Gao et al. 2023 show such curves for single reward models, Coste et al. 2023 for ensembles. The reward models of a seed
learn from the same rankings. Every policy starts from the same SFT model, and logs its KL to it, which costs nothing.
Takes about twenty minutes on two cores. Finished runs are not repeated.
"""

import argparse
import statistics
from pathlib import Path

from desk import COLOURS, first_rankings, gold_over_kl, learn_policy, picture, prepare
from rich.console import Console
from rich.table import Table

from keel.config import RewardConfig, parse
from keel.quickstart.run import Quickstart, reward_settings
from keel.supervised.reward import reward

SCORERS = {"one reward model": "mean", "mean of 4": "mean", "minimum of 4": "min", "mean - deviation of 4": "lower"}
WINDOW = 5  # steps over which a curve is averaged


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--seeds", type=int, default=2)
    options.add_argument("--rankings", type=int, default=150)
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--learning-rate", type=float, default=3e-4)
    given = options.parse_args()
    curves: dict[str, list[list[tuple[float, float, float]]]] = {name: [] for name in SCORERS}
    for seed in range(given.seeds):
        run = prepare(given.folder / f"world-{seed}", seed)
        single, ensemble = (judges(run, members, given) for members in (1, 4))
        for number, (name, combine) in enumerate(SCORERS.items()):
            model = single if number == 0 else ensemble
            output = run.root / f"unheld-{number}"
            learn_policy(run, output, unheld(given, {"model": model, "combine": combine}, run))
            curves[name].append(list(zip(*gold_over_kl(output), strict=True)))
    print_table(curves)
    labels = ("nothing holds the policy back", "KL to the SFT model, nats a response", "gold score")
    picture(given.folder / "overoptimisation.png", labels, lambda axis: draw(axis, curves))
    print(f"picture: {given.folder / 'overoptimisation.png'}")


def judges(run: Quickstart, members: int, given: argparse.Namespace) -> str:
    """Train one reward model or an ensemble on the first rankings."""
    output = run.root / f"reward-{members}"
    values = reward_settings(run).model_dump()
    values |= {"output": str(output), "members": members, "epochs": 6.0}
    values["data"]["path"] = first_rankings(run, given.rankings, run.root / "few.jsonl")
    if not (output / "model").exists():
        reward(parse(RewardConfig, values), resume=output.exists())
    return str(output / "model")


def unheld(given: argparse.Namespace, scorer: dict[str, str], run: Quickstart) -> dict[str, object]:
    return {
        "steps": given.steps,
        "rewards": [scorer],
        "reference": run.path("sft/model"),
        "algorithm": {"kl_coef": 0.0},
        "optim": {"learning_rate": given.learning_rate, "schedule": "constant"},
        "log": {"rollouts_per_step": 64},
    }


def smoothed(values: list[float]) -> list[float]:
    return [statistics.fmean(values[max(0, i - WINDOW + 1) : i + 1]) for i in range(len(values))]


def print_table(curves: dict[str, list[list[tuple[float, float, float]]]]) -> None:
    """Print means over the seeds. The peak is that of the smoothed curve."""
    table = Table("scorer", "gold at its peak", "KL there", "gold at the end", "KL there", "score at the end")
    for name, runs in curves.items():
        rows = []
        for points in runs:
            kl, gold, score = (smoothed(list(column)) for column in zip(*points, strict=True))
            peak = max(range(len(gold)), key=gold.__getitem__)
            rows.append((gold[peak], kl[peak], gold[-1], kl[-1], score[-1]))
        table.add_row(name, *(f"{statistics.fmean(column):.2f}" for column in zip(*rows, strict=True)))
    Console(width=110).print(table)


def draw(axis: object, curves: dict[str, list[list[tuple[float, float, float]]]]) -> None:
    for colour, (name, runs) in zip(COLOURS, curves.items(), strict=False):
        for number, points in enumerate(runs):
            kl, gold, _ = (smoothed(list(column)) for column in zip(*points, strict=True))
            axis.plot(kl, gold, color=colour, linewidth=1.6, alpha=0.85, label=None if number else name)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
