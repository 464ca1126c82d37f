"""Make the runs of the zoo, and record what each really did to the responses."""

import json
import shutil
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import zoo_functions
from zoo_cases import CASES, RATES, STEPS, Case
from zoo_faults import induced
from zoo_world import JUDGES

from keel.config import QuickstartConfig, TrainConfig, parse
from keel.errors import Diverged
from keel.quickstart.report import gold_by_step, read_lines, series
from keel.quickstart.run import Quickstart, policy_settings
from keel.run.folder import write_atomic
from keel.training.policy import train_policy

LOGGED = 16  # answers a step
ENDS = 5  # steps at either end of a run whose means are compared


def make_run(output: Path, world: Path, name: str, seed: int) -> None:
    """Make a run and its truth, unless the truth exists."""
    truth = output.with_name(f"{output.name}.truth.json")
    if truth.exists():
        return
    shutil.rmtree(output, ignore_errors=True)
    torch.set_num_threads(1)
    started, end = time.monotonic(), "finished"
    case = CASES[name]
    config = settings(case, output, world, seed)
    try:
        with induced(case.fault, case.statistics):
            train_policy(config)
    except Diverged as error:
        end = f"diverged: {error}"
    for spare in ("checkpoints", "critic"):
        shutil.rmtree(output / spare, ignore_errors=True)
    found = truth_of(output) | {"end": end, "seconds": round(time.monotonic() - started, 1)}
    found |= {"case": name, "seed": seed, "algorithm": config.algorithm.name, "expected": list(case.expected)}
    write_atomic(truth, json.dumps(found) + "\n")
    print(summary(found), flush=True)


def settings(case: Case, output: Path, world: Path, seed: int) -> TrainConfig:
    """Merge the settings of the quickstart, of the algorithm and of the case."""
    name = case.algorithm(seed)
    values = policy_settings(Quickstart(parse(QuickstartConfig, {"output": str(world), "seed": seed}))).model_dump()
    rewards = [judge(case.judge, world) | {"weight": case.weight}]
    if case.has_second(seed):
        rewards.append(judge("second", world) | {"weight": 0.0})
    values |= {"output": str(output), "steps": STEPS, "rewards": rewards, "log": {"rollouts_per_step": LOGGED}}
    values["algorithm"] = {"name": name, "kl_coef": 0.05}
    values["rollout"] |= {"group_size": None}
    values["optim"] |= {"learning_rate": case.rate * RATES[name], "warmup_steps": 48 if name == "ppo" else 0}
    for key, value in json.loads(json.dumps(case.changes).replace("{world}", str(world))).items():
        values[key] = values[key] | value if isinstance(value, Mapping) else value
    return parse(TrainConfig, values)


def judge(name: str, world: Path) -> dict[str, Any]:
    if name in JUDGES:
        return {"model": str(world / name / "model")}
    return {"function": f"{zoo_functions.__file__}:{name}"}


def truth_of(output: Path) -> dict[str, Any]:
    """Return the mean gold score of the logged responses of each step, which the run does not see."""
    steps, gold = gold_by_step(output / "rollouts.jsonl")
    metrics = read_lines(output / "metrics.jsonl")
    names = {"score": "objective/scores", "kl": "objective/kl", "length": "response/length"}
    ends = {short: first_and_last(series(metrics, name)[1]) for short, name in names.items()}
    return {"steps": steps, "gold": gold, "first_and_last": {"gold": first_and_last(gold), **ends}}


def first_and_last(values: list[float]) -> list[float]:
    """Return the means over the first and over the last few steps, or nothing without steps."""
    return [statistics.fmean(part) for part in (values[:ENDS], values[-ENDS:])] if values else []


def summary(truth: Mapping[str, Any]) -> str:
    ends = ", ".join(f"{name} {pair[0]:.2f} -> {pair[1]:.2f}" for name, pair in truth["first_and_last"].items() if pair)
    place = f"{truth['case']}-{truth['seed']} ({truth['algorithm']})"
    return f"{place}: {len(truth['steps'])} steps, {ends}, {truth['end']}, {truth['seconds']} s"
