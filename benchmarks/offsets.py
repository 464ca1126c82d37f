"""Measure whether the result depends on a constant added to the reward, or on the scale of the reward.

    python benchmarks/offsets.py SHARED --jobs 2 --json offsets.json
    python benchmarks/offsets.py SHARED --algorithms ppo trl --critics separate --offsets 0 5 -5  # beside TRL

A story model learns to write words that people rate as positive (a fifth of the sum of VADER's valences). The reward is
scale * valence + offset, with kl_coef * scale, so the task is the same for all scales and offsets. SHARED is a folder
with models/stories260K, data/prompts/story_openings.jsonl and data/sentiment/vader_lexicon.txt. Each result is the mean
valence of the last five steps, in units of offset 0 and scale 1.
"""

import argparse
import json
import logging
import re
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers.utils import logging as transformers_logging

WORD = re.compile(r"[a-z']+")
LAST = 5  # steps that a figure is the mean of


@dataclass(frozen=True)
class Run:
    """One training run."""

    shared: str
    algorithm: str
    critic: str  # separate, shared, none
    offset: float
    scale: float
    seed: int
    steps: int
    variant: tuple[str, ...]
    venv: str  # the environment that has TRL


def valence_reward(lexicon: Path, offset: float, scale: float) -> Callable[..., list[float]]:
    """Return offset + scale * a fifth of the summed valence of a response's words."""
    rows = (line.split("\t") for line in lexicon.read_text(encoding="utf-8").splitlines())
    valences = {row[0]: float(row[1]) for row in rows}

    def reward(completions: list[str], **_: object) -> list[float]:
        return [
            offset + scale * sum(valences.get(w, 0.0) for w in WORD.findall(text.lower())) / 5 for text in completions
        ]

    return reward


def train(run: Run) -> list[dict[str, float]]:
    """Train, and return the metrics of every step, with scores in units of offset 0 and scale 1."""
    if run.algorithm == "trl":
        return train_trl(run)
    import keel

    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    shared = Path(run.shared)
    config: dict[str, Any] = {
        "seed": run.seed,
        "steps": run.steps,
        "policy": {"model": str(shared / "models/stories260K")},
        "critic": {"sharing": run.critic if run.critic != "none" else "separate"},
        "prompts": {"path": str(shared / "data/prompts/story_openings.jsonl"), "max_tokens": 64, "too_long": "drop"},
        "rollout": {"batch_size": 64, "max_response_tokens": 32},
        "algorithm": {"name": run.algorithm, "kl_coef": 0.05 * run.scale},
        "optim": {"learning_rate": 3e-4},
        "checkpoint": {"every": 0},
        "log": {"rollouts_per_step": 0},
        "doctor": "quiet",
    }
    for item in run.variant:
        key, value = item.split("=", 1)
        section, name = key.split(".")
        config.setdefault(section, {})[name] = yaml.safe_load(value)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        reward = valence_reward(shared / "data/sentiment/vader_lexicon.txt", run.offset, run.scale)
        keel.train({"output": str(output), **config}, scorers=[reward])
        steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [step | {"score": (step["objective/scores"] - run.offset) / run.scale} for step in steps]


def train_trl(run: Run) -> list[dict[str, float]]:
    """Train with TRL's PPO in its environment."""
    shared = Path(run.shared)
    given = {
        "policy": str(shared / "models/stories260K"),
        "prompts": str(shared / "data/prompts/story_openings.jsonl"),
        "lexicon": str(shared / "data/sentiment/vader_lexicon.txt"),
        **{name: getattr(run, name) for name in ("offset", "scale", "seed", "steps")},
    }
    with tempfile.TemporaryDirectory() as folder:
        task, result = Path(folder) / "run.json", Path(folder) / "result.json"
        task.write_text(json.dumps(given))
        command = [Path(run.venv) / "bin" / "python", Path(__file__).parent / "trl_offsets.py", task, result]
        log = subprocess.run(command, capture_output=True, text=True, check=False)
        if log.returncode:
            raise RuntimeError(log.stderr[-3000:])
        found: list[dict[str, float]] = json.loads(result.read_text())
    return found


def final(steps: Sequence[dict[str, float]], name: str) -> float:
    return statistics.fmean(step[name] for step in steps[-LAST:])


def main() -> None:
    options = parse_arguments()
    kinds = [(name, critic) for name in options.algorithms for critic in critics_of(name, options.critics)]
    rewards = [(offset, 1.0) for offset in options.offsets] + [(0.0, scale) for scale in options.scales]
    runs = [
        Run(options.shared, name, critic, offset, scale, seed, options.steps, tuple(options.variant), options.venv)
        for name, critic in kinds
        for offset, scale in rewards
        for seed in options.seeds
    ]
    found = {}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for run, steps in zip(runs, pool.map(train, runs), strict=True):
            found[run] = {
                "score": final(steps, "score"),
                "kl": final(steps, "objective/kl"),
            }
            print(f"{run.algorithm} {run.critic} offset {run.offset:g} scale {run.scale:g} seed {run.seed}: "
                  f"score {found[run]['score']:.2f} kl {found[run]['kl']:.2f}", flush=True)  # fmt: skip
    print_table(found, kinds, rewards)
    if options.json:
        rows = [vars(run) | figures for run, figures in found.items()]
        Path(options.json).write_text(json.dumps(rows, indent=1, default=str))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared")
    parser.add_argument("--algorithms", nargs="+", default=["ppo", "a2c"])
    parser.add_argument("--critics", nargs="+", default=["separate", "shared"])
    parser.add_argument("--offsets", nargs="+", type=float, default=[0, 1, -1, 5, -5, 50, -50])
    parser.add_argument("--scales", nargs="*", type=float, default=[0.01, 0.1, 10, 100])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--variant", nargs="+", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--venv", default=".venv-trl", help="environment with TRL; compare_trl.py creates it")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes, with one thread each")
    parser.add_argument("--json", help="write all results to this file")
    return parser.parse_args()


def critics_of(algorithm: str, critics: Sequence[str]) -> Sequence[str]:
    return critics if algorithm in ("ppo", "a2c") else ["separate" if algorithm == "trl" else "none"]


def print_table(found: dict[Run, dict[str, float]], kinds: Sequence[Any], rewards: Sequence[Any]) -> None:
    """Print a line for each reward: for each algorithm and critic the scores of the seeds, and the mean KL."""
    print(f"\n{'offset':>6} {'scale':>5} " + " ".join(f"{f'{name}, {critic}':>26}" for name, critic in kinds))
    for offset, scale in rewards:
        cells = []
        for name, critic in kinds:
            own = [f for run, f in found.items()
                   if (run.algorithm, run.critic, run.offset, run.scale) == (name, critic, offset, scale)]  # fmt: skip
            scores = " ".join(f"{each['score']:.2f}" for each in own)
            cells.append(f"{scores} ({statistics.fmean(each['kl'] for each in own):.1f})")
        print(f"{offset:>6g} {scale:>5g} " + " ".join(f"{cell:>26}" for cell in cells))


if __name__ == "__main__":
    main()
