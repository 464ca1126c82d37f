"""Compare reward models of keel and of TRL's RewardTrainer: the same pairs, passes, batches and learning rate.

    python benchmarks/compare_reward.py --models FOLDER --pairs train.jsonl --held-out test.jsonl

Pairs are rows of prompt, chosen, rejected. Both sides run alternately. Seconds are of the training only. Accuracy is on
the held-out pairs, as each side reports it, with half the width of its 95% interval. TRL runs in a separate
environment, which the first run creates (--venv).
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from compare_trl import PINS_AFTER_PPO, trl_python
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, metavar="FOLDER", help="pre-trained models")
    parser.add_argument("--pairs", required=True, metavar="FILE", help="jsonl: prompt, chosen, rejected")
    parser.add_argument("--held-out", required=True, metavar="FILE", help="jsonl of the same kind, with other prompts")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side, with different seeds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--venv", default=".venv-trl-reward", help="environment with TRL; created if it does not exist")
    parser.add_argument("--json", help="write all results to this file")
    options = parser.parse_args()
    sides = {
        "trl": [trl_python(Path(options.venv), PINS_AFTER_PPO), HERE / "trl_reward.py"],
        "keel": [sys.executable, HERE / "keel_reward.py"],
    }
    found = {}
    for model in options.models:
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for seed in range(options.rounds):
            for side, command in sides.items():
                runs[side].append(run(command, task(model, seed, options)))
                print(f"{model}, {side}: {runs[side][-1]}", flush=True)
        found[model] = runs
        show(Path(model).name, runs, len(Path(options.held_out).read_text().splitlines()))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))


def task(model: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return one job: the settings that both sides share."""
    return {
        "model": str(Path(model).resolve()),
        "pairs": str(Path(options.pairs).resolve()),
        "held_out": str(Path(options.held_out).resolve()),
        "epochs": options.epochs,
        "learning_rate": options.learning_rate,
        "threads": options.threads,
        "seed": seed,
        "batch_size": 32,
        "max_tokens": 256,
        "center_coef": 0.01,
    }


def run(command: list[Any], job: dict[str, Any]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        file, result = Path(folder) / "task.json", Path(folder) / "result.json"
        file.write_text(json.dumps(job))
        log = subprocess.run([*command, file, result], capture_output=True, text=True)
        if log.returncode:
            raise SystemExit(f"{command[-1]} failed:\n{log.stderr[-3000:]}")
        return json.loads(result.read_text())


def show(name: str, runs: dict[str, list[dict[str, float]]], held_out: int) -> None:
    table = Table("", *runs, title=name)
    for figure in ("seconds", "accuracy", "peak_mb"):
        table.add_row(figure, *(f"{statistics.median(run[figure] for run in each):.4g}" for each in runs.values()))
    seconds = {side: statistics.median(run["seconds"] for run in each) for side, each in runs.items()}
    accuracy = statistics.mean(run["accuracy"] for run in runs["keel"])
    width = 1.96 * math.sqrt(accuracy * (1 - accuracy) / held_out)
    table.caption = f"keel: {seconds['trl'] / seconds['keel']:.2f} times as fast; accuracies to within {width:.3f}"
    Console().print(table)


if __name__ == "__main__":
    main()
