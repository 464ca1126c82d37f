"""Compare three ways to learn from the same rankings: PPO and A2C with a reward model, DPO without one.

The result is the gold win rate against the SFT model over the KL to it, on the quickstart's example.

    python benchmarks/objectives.py runs/objectives

Each way runs with several costs of the KL (kl_coef, or DPO's beta). It is better where its curve is higher at the same
KL. Takes about twenty minutes on two cores. Finished runs are not repeated.
"""

import argparse
from pathlib import Path
from typing import Any

from desk import COLOURS, judged, learn_policy, picture, prepare
from rich.console import Console
from rich.table import Table

from keel.config import DpoConfig, parse
from keel.quickstart.run import Quickstart
from keel.supervised.dpo import dpo

A2C = {"rollout": {"batch_size": 128}, "optim": {"learning_rate": 1e-3, "warmup_steps": 0}, "steps": 32}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--kl-coefs", type=float, nargs="+", default=[0.3, 0.1, 0.03, 0.01])
    options.add_argument("--betas", type=float, nargs="+", default=[3.0, 1.0, 0.3, 0.1])
    given = options.parse_args()
    run = prepare(given.folder / f"world-{given.seed}", given.seed)
    curves: dict[str, list[tuple[float, dict[str, Any]]]] = {"PPO": [], "A2C": [], "DPO": []}
    for kl_coef in given.kl_coefs:
        for name in ("PPO", "A2C"):
            output = run.root / f"{name.lower()}-{kl_coef:g}"
            learn_policy(run, output, policy_changes(name, kl_coef))
            curves[name].append((kl_coef, judged(run, output / "policy")))
    for beta in given.betas:
        curves["DPO"].append((beta, judged(run, learned_by_dpo(run, beta))))
    print_table(curves)
    labels = ("the same rankings, three ways", "KL to the SFT model, nats a response", "gold win rate against SFT")
    picture(given.folder / "objectives.png", labels, lambda axis: draw(axis, curves))
    print(f"picture: {given.folder / 'objectives.png'}")


def policy_changes(name: str, kl_coef: float) -> dict[str, Any]:
    """Return the quickstart's settings of an algorithm with another kl_coef."""
    algorithm = {"name": name.lower(), "kl_coef": kl_coef}
    if name == "PPO":
        return {"algorithm": algorithm}
    free = {"update_epochs": None, "minibatch_size": None}
    return {"algorithm": algorithm | free, **A2C}


def learned_by_dpo(run: Quickstart, beta: float) -> Path:
    """Train a policy with `keel dpo` on the rankings of the reward model."""
    output = run.root / f"dpo-{beta:g}"
    values = {
        "output": str(output),
        "seed": run.config.seed,
        "model": run.path("sft/model"),
        "data": {"path": run.path("rankings.jsonl"), "eval_fraction": 0.1},
        "beta": beta,
        "epochs": 3,
        "batch_size": 16,
        "optim": {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 10},
    }
    if not (output / "policy").exists():
        dpo(parse(DpoConfig, values), resume=output.exists())
    return output / "policy"


def print_table(curves: dict[str, list[tuple[float, dict[str, Any]]]]) -> None:
    table = Table("", "pull", "KL", "gold win rate against SFT", "gold score", "reward-model score", "length")
    for name, points in curves.items():
        for pull, figures in points:
            policy = figures["policy"]
            rate = f"{figures['win_rate']:.3f} [{figures['win_rate_low']:.3f}, {figures['win_rate_high']:.3f}]"
            rest = (f"{policy[key]:.2f}" for key in ("score", "rewards/model", "length"))
            table.add_row(name, f"{pull:g}", f"{policy['kl']:.2f}", rate, *rest)
    Console(width=110).print(table)


def draw(axis: Any, curves: dict[str, list[tuple[float, dict[str, Any]]]]) -> None:
    for colour, (name, points) in zip(COLOURS, curves.items(), strict=False):
        found = sorted((figures["policy"]["kl"], figures) for _, figures in points)
        kl, rates = [kl for kl, _ in found], [figures["win_rate"] for _, figures in found]
        spans = [
            [f["win_rate"] - f["win_rate_low"] for _, f in found],
            [f["win_rate_high"] - f["win_rate"] for _, f in found],
        ]
        axis.set_xscale("log")
        axis.errorbar(kl, rates, yerr=spans, color=colour, marker="o", linewidth=1.6, capsize=3, label=name)


if __name__ == "__main__":
    main()
