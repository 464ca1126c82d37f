"""Measure how close `keel.train` comes to the exact optimum, on worlds (tasks) that are small enough to enumerate.

    python benchmarks/optimum.py --worlds 6 --seed 0 --run-seeds 0 1 2 --jobs 2 --json optimum.json
    python benchmarks/optimum.py --worlds 3 --algorithms ppo --variant algorithm.whiten_advantages=false
    python benchmarks/optimum.py --worlds 3 --algorithms grpo gspo cispo dynamic reinforce++   # the variants
    python benchmarks/optimum.py --worlds 0 --t3          # the world T3: total variation to pi*
    python benchmarks/optimum.py --algorithms ppo --trl   # TRL 1.12's PPO beside keel's, on the random worlds

regret = (J* - J) / (J* - J_ref), J summed over every response under the trained policy, in percent.
floor  = regret of exact gradient ascent on J: the same network, initial weights, AdamW, learning rate and schedule,
         with as many optimizer steps as the run has steps. No algorithm is responsible for this regret.
best   = the lowest floor over the learning rates of all algorithms measured, and over every number in --floor-steps.
excess = regret - floor, and regret - best: the additional cost of sampling and of the algorithm.
"""

import argparse
import json
import logging
import math
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers.utils import logging as transformers_logging
from worlds import Exact, World, answer_logprobs, answers, exact, load, measure, objective, random_world, t3_world

# One setting for all worlds. What is not named here is keel's default.
COMMON: dict[str, Any] = {
    "rollout": {"batch_size": 256, "temperature": 1.0},
    "optim": {"schedule": "linear"},
    "log": {"rollouts_per_step": 0},
    "doctor": "quiet",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": {"optim.learning_rate": 3e-4, "optim.critic_learning_rate": 3e-3},
    "a2c": {"optim.learning_rate": 1e-3, "optim.critic_learning_rate": 1e-2},
    "rloo": {"optim.learning_rate": 1e-3},
    "reinforce": {"optim.learning_rate": 1e-3},
    "grpo": {"optim.learning_rate": 1e-3},
    "reinforce++": {"optim.learning_rate": 1e-3},
    # Variants of grpo, as docs/algorithms.md describes them, with the KL of the world in the reward.
    "gspo": {
        "algorithm.name": "grpo",
        "algorithm.ratio_level": "sequence",
        "algorithm.loss_aggregation": "sequence",
        "algorithm.clip_range_low": 3e-4,
        "algorithm.clip_range_high": 4e-4,
        "optim.learning_rate": 1e-3,
    },
    "cispo": {
        "algorithm.name": "grpo",
        "algorithm.clip_target": "weight",
        "algorithm.clip_range_low": 1.0,
        "algorithm.clip_range_high": 2.0,
        "optim.learning_rate": 1e-3,
    },
    "dynamic": {"algorithm.name": "grpo", "rollout.resample_rounds": 10, "optim.learning_rate": 1e-3},
}
DEFAULT_ALGORITHMS = ("ppo", "a2c", "rloo", "reinforce", "grpo")
ALGORITHMS = tuple(SETTINGS)
SETTINGS["trl"] = SETTINGS["ppo"]


@dataclass(frozen=True)
class Run:
    """One training run: its settings, its world, and the resulting curve."""

    world: World
    algorithm: str
    config: dict[str, Any]
    marks: tuple[int, ...]  # steps at which the policy is measured
    trl_python: str = ""  # the interpreter that has TRL, for its run


@dataclass(frozen=True)
class Climb:
    """One run of exact gradient ascent."""

    world: World
    learning_rate: float
    schedule: str
    steps: int

    @property
    def key(self) -> tuple[str, float, str, int]:
        return self.world.name, self.learning_rate, self.schedule, self.steps


def main() -> None:
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.work or scratch)
        worlds = [random_world(folder / f"random-{i}", i) for i in range(options.seed, options.seed + options.worlds)]
        seeds = options.run_seeds
        runs = [plan(world, "trl", seed, folder, options) for world in worlds for seed in seeds if options.trl]
        worlds += [t3_world(folder / "T3")] if options.t3 else []
        kinds = [(world, name) for world in worlds for name in options.algorithms]
        runs += [plan(world, name, seed, folder, options) for world, name in kinds for seed in seeds]
        rows = measure_all(runs, options)
    print_table(rows)
    print_summary(rows)
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=6, help="number of random worlds")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first world; the next worlds have the next seeds"
    )
    parser.add_argument("--run-seeds", type=int, nargs="+", default=[0], help="seeds of the training runs")
    parser.add_argument("--t3", action="store_true", help="also the three-letter world T3 (tests/oracles/t3.py)")
    parser.add_argument("--algorithms", nargs="+", default=list(DEFAULT_ALGORITHMS), choices=list(ALGORITHMS))
    parser.add_argument("--trl", action="store_true", help="also run TRL's PPO, with keel's learning rate and batches")
    parser.add_argument("--venv", default=".venv-trl", help="environment with TRL; compare_trl.py creates it")
    parser.add_argument("--variant", nargs="+", default=[], metavar="KEY=VALUE", help="further dotted settings")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument(
        "--floor-steps", type=int, nargs="+", help="optimizer steps of the floor (default: --steps); more for `best`"
    )
    parser.add_argument("--jobs", type=int, default=1, help="number of processes, with one thread each")
    parser.add_argument("--json", help="write all results to this file")
    parser.add_argument("--work", help="keep worlds and run folders here")
    return parser.parse_args()


def plan(world: World, algorithm: str, seed: int, folder: Path, options: argparse.Namespace) -> Run:
    """Return the settings of one training run for `keel train`."""
    config = deepcopy(COMMON)
    marks = tuple(sorted({math.ceil(options.steps * share) for share in (0.25, 0.5, 1.0)}))
    given = {
        "output": str(folder / "runs" / f"{world.name}-{algorithm}-{seed}"),
        "seed": seed,
        "steps": options.steps,
        "policy.model": str(world.folder / "policy"),
        "prompts.path": str(world.folder / "prompts.jsonl"),
        "rollout.max_response_tokens": world.length,
        "algorithm.name": "ppo" if algorithm == "trl" else algorithm,
        "algorithm.kl_coef": world.kl_coef,
        "checkpoint.every": math.gcd(*marks),
        "checkpoint.keep": 0,
        **SETTINGS[algorithm],
        **{key: yaml.safe_load(value) for key, value in (item.split("=", 1) for item in options.variant)},
    }
    for key, value in given.items():
        *sections, name = key.split(".")
        target = config
        for section in sections:
            target = target.setdefault(section, {})
        target[name] = value
    python = str(Path(options.venv) / "bin" / "python") if algorithm == "trl" else ""
    return Run(world, algorithm, config, marks, python)


def measure_all(runs: Sequence[Run], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run all trainings, each with its floor and the best floor of its world."""
    schedules = {(float(run.config["optim"]["learning_rate"]), run.config["optim"]["schedule"]) for run in runs}
    lengths = options.floor_steps or [options.steps]
    climbs = [
        Climb(world, rate, schedule, steps)
        for world in {run.world.name: run.world for run in runs}.values()
        for rate, schedule in sorted(schedules)
        for steps in lengths
    ]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn"), initializer=quiet) as pool:
        floors = {item.key: pool.submit(climb, item) for item in climbs}
        trained = [(run, pool.submit(train_trl if run.trl_python else train, run)) for run in runs]
        rows = []
        for run, future in trained:
            optim = run.config["optim"]
            own = floors[run.world.name, float(optim["learning_rate"]), optim["schedule"], lengths[0]].result()
            best = min(found.result()[-1] for key, found in floors.items() if key[0] == run.world.name)
            rows.append(future.result() | {"floor": own, "best_floor": best})
            regret, seconds = rows[-1]["regret"][-1], rows[-1]["seconds"]
            figures = f"regret {regret:.2f}, floor {own[-1]:.2f}, {seconds:.0f} s"
            print(f"{run.world.name} {run.algorithm} seed {run.config['seed']}: {figures}", flush=True)
    return rows


def quiet() -> None:
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)


def train(run: Run) -> dict[str, Any]:
    """Run keel.train, then enumerate every response under the policies that it saved."""
    import keel

    start = time.perf_counter()
    keel.train(run.config, scorers=[run.world.scorer()])
    output = Path(run.config["output"])
    curve = [measure(run.world, output / "checkpoints" / f"step-{step:06d}" / "policy") for step in run.marks[:-1]]
    return row_of(run, [point.regret for point in curve], measure(run.world, output / "policy"), start)


def train_trl(run: Run) -> dict[str, Any]:
    """Train with TRL's PPO in its environment. Only the last policy is measured."""
    world, output = run.world, Path(run.config["output"])
    output.mkdir(parents=True)
    table = [
        [[*prompt, *answer], score]
        for prompt, row in zip(world.prompts, world.scores.tolist(), strict=True)
        for answer, score in zip(answers(world.vocabulary, world.length), row, strict=True)
    ]
    given = {
        "policy": str(world.folder / "policy"),
        "prompts": world.prompts,
        "scores": table,
        "length": world.length,
        "kl_coef": world.kl_coef,
        "batch_size": run.config["rollout"]["batch_size"],
        "steps": run.config["steps"],
        "learning_rate": run.config["optim"]["learning_rate"],
        "seed": run.config["seed"],
    }
    (output / "world.json").write_text(json.dumps(given))
    start = time.perf_counter()
    command = [run.trl_python, Path(__file__).parent / "trl_optimum.py", output / "world.json", output / "policy"]
    log = subprocess.run(command, capture_output=True, text=True)
    if log.returncode:
        raise RuntimeError(log.stderr[-3000:])
    return row_of(run, [math.nan] * (len(run.marks) - 1), measure(world, output / "policy"), start)


def row_of(run: Run, regrets: Sequence[float], last: Exact, start: float) -> dict[str, Any]:
    """Return the table row of a finished training. `regrets` are those at all marks but the last."""
    return {
        "world": run.world.name,
        "vocabulary": run.world.vocabulary,
        "length": run.world.length,
        "kl_coef": run.world.kl_coef,
        "algorithm": run.algorithm,
        "seed": run.config["seed"],
        "steps": run.marks,
        "regret": [*(100 * regret for regret in regrets), 100 * last.regret],
        "final": asdict(last),
        "seconds": time.perf_counter() - start,
    }


def climb(item: Climb) -> list[float]:
    """Return the regret of gradient ascent on J by enumeration, after a quarter, half and all of the steps."""
    world, marks = item.world, {math.ceil(item.steps * share) for share in (0.25, 0.5, 1.0)}
    model = load(world.folder / "policy")
    with torch.no_grad():
        ref_logprobs = answer_logprobs(model, world.prompts, world.length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=item.learning_rate, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: rate_factor(item.schedule, i / item.steps))
    regrets = []
    for step in range(item.steps + 1):
        logprobs = answer_logprobs(model, world.prompts, world.length)
        if step in marks:
            regrets.append(100 * exact(logprobs.detach(), ref_logprobs, world.scores, world.kl_coef).regret)
        optimizer.zero_grad()
        (-objective(logprobs, ref_logprobs, world.scores, world.kl_coef)).backward()
        optimizer.step()
        scheduler.step()
    return regrets


def rate_factor(schedule: str, progress: float) -> float:
    return {
        "constant": 1.0,
        "linear": max(0.0, 1.0 - progress),
        "cosine": (1.0 + math.cos(math.pi * min(1.0, progress))) / 2,
    }[schedule]


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print a line for each training: regret and floor after a quarter, half and all of the steps."""
    steps = "/".join(str(step) for step in rows[0]["steps"])
    print(f"\nIn points of 100, after {steps} steps:")
    print(
        f"{'world':10} {'V':>2} {'T':>2} {'kl_coef':>7} {'algorithm':11} {'seed':>4} {'regret':^20} {'floor':^20} "
        f"{'best':>6} {'excess':>7} {'TV':>6} {'J':>7} {'J*':>7} {'s':>5}"
    )
    for row in rows:
        final = row["final"]
        curves = " ".join(" ".join(f"{x:6.2f}" for x in values) for values in (row["regret"], row["floor"]))
        print(
            f"{row['world']:10} {row['vocabulary']:2} {row['length']:2} {row['kl_coef']:7.3f} {row['algorithm']:11} "
            f"{row['seed']:4} {curves} {row['best_floor']:6.2f} {row['regret'][-1] - row['floor'][-1]:7.2f} "
            f"{final['total_variation']:6.4f} {final['objective']:7.4f} {final['optimum']:7.4f} {row['seconds']:5.0f}"
        )


def print_summary(rows: Sequence[dict[str, Any]]) -> None:
    """Print the means of each algorithm over the worlds, at the end of the run."""
    for algorithm in dict.fromkeys(row["algorithm"] for row in rows):
        own = [row for row in rows if row["algorithm"] == algorithm]
        for name, floors in (
            ("floor", [row["floor"][-1] for row in own]),
            ("best", [row["best_floor"] for row in own]),
        ):
            excess = [row["regret"][-1] - floor for row, floor in zip(own, floors, strict=True)]
            middle, worst = statistics.median(excess), max(excess)
            print(f"{algorithm:11} excess over {name:5}: median {middle:6.2f}, worst {worst:6.2f}, {len(own)} runs")


if __name__ == "__main__":
    main()
