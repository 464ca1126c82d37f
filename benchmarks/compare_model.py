"""Compare keel with TRL, and PPO also with a loop in plain transformers, on a real model (compare_trl.py --model)."""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tasks import Task, reward_model
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
PHASES = ("sample", "score and targets", "update")
FROM_PAIRS = ("dpo", "reward", "sft")

Result = dict[str, Any]


def compare(options: argparse.Namespace, python: Path, best: list[str]) -> list[Result]:
    """Run every side alternately on the same task, and print and return the results of each length."""
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.work or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        lengths = ["natural"] if options.algorithm in FROM_PAIRS else options.lengths
        for task in [real_task(folder, length, options) for length in lengths]:
            sides = {name: command for name, command in commands(task, python, best).items() if name in options.sides}
            runs: dict[str, list[Result]] = {side: [] for side in sides}
            for turn in range(options.rounds):
                for side, command in sides.items():
                    runs[side].append(run(task, side, command, folder))
                    seconds = typical(runs[side][-1], "seconds")
                    print(f"{task.name}, {side}, run {turn + 1}: {seconds:.2f} s a step", flush=True)
            results.append({"task": task.name, "sides": {side: summary(each) for side, each in runs.items()}})
            results[-1]["ratios"] = {side: ratios(runs[side], runs) for side in runs}
            show(results[-1])
    return results


def real_task(folder: Path, length: str, options: argparse.Namespace) -> Task:
    """Make a task from the options. Pairs are cut to those that the steps use, so that no side reads more."""
    model, data = float32_copy(Path(options.model).resolve(), folder), Path(options.pairs or options.openings).resolve()
    reward = folder / f"{model.name}-reward"
    if options.algorithm in FROM_PAIRS:
        rows = data.read_text().splitlines()[: options.steps * options.batch_size]
        if len(rows) < options.steps * options.batch_size:
            raise SystemExit(f"{data} has {len(rows)} rows: lower --steps or --batch-size")
        if options.algorithm == "sft":
            pairs = map(json.loads, rows)
            rows = [json.dumps({"prompt": pair["prompt"], "completion": pair["chosen"]}) for pair in pairs]
        data = folder / "pairs.jsonl"
        data.write_text("".join(f"{row}\n" for row in rows))
    elif options.algorithm == "ppo" and not reward.exists():
        reward_model(model, reward)
    return Task(
        f"{model.name}, {options.algorithm}" + ("" if options.algorithm in FROM_PAIRS else f", {length} length"),
        str(model),
        str(reward),
        str(data),
        batch_size=options.batch_size,
        max_response_tokens=options.response_tokens,
        update_epochs=options.epochs if options.algorithm == "ppo" else 1,
        minibatches=options.minibatches,
        steps=options.steps,
        threads=options.threads,
        algorithm=options.algorithm,
        full_length=length == "full",
    )


def float32_copy(model: Path, folder: Path) -> Path:
    """Save the model in float32, since TRL and transformers compute in the number format of the file."""
    copy = folder / model.name
    if not copy.exists():
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).save_pretrained(copy)
        AutoTokenizer.from_pretrained(model).save_pretrained(copy)
    return copy


def commands(task: Task, python: Path, best: list[str]) -> dict[str, tuple[list[Any], list[str]]]:
    """Return the script of each side, and its changes of keel's settings."""
    keel = [sys.executable, HERE / "keel_model.py"]
    if task.algorithm != "ppo":
        return {"trl": ([python, HERE / "trl_model.py"], []), "keel": (keel, [])}
    plain = [sys.executable, HERE / "plain_ppo.py"]
    return {
        "trl": ([python, HERE / "trl_model.py"], []),
        "plain": (plain, []),
        "keel": (keel, []),
        "keel best": (keel, best),
    }


def run(task: Task, side: str, command: tuple[list[Any], list[str]], folder: Path) -> Result:
    """Run one side in a separate process, so that its peak memory is measured separately."""
    file, result = task.write(folder / "task.json"), folder / "result.json"
    log = subprocess.run([*command[0], file, result, *command[1]], capture_output=True, text=True)
    if log.returncode:
        raise SystemExit(f"{side} failed on {task.name}:\n{log.stderr[-3000:]}")
    measured: Result = json.loads(result.read_text())
    return measured


def total(step: Result, what: str, phases: tuple[str, ...] = PHASES) -> float:
    return sum(step["phases"].get(phase, {}).get(what, 0) for phase in phases)


def typical(run: Result, what: str, phases: tuple[str, ...] = PHASES) -> float:
    """Return the median over the counted steps of a run: all but the first."""
    return statistics.median(total(step, what, phases) for step in run["steps"][1:])


def summary(runs: list[Result]) -> Result:
    """Return medians over the runs of one side."""

    def middle(what: str, phases: tuple[str, ...] = PHASES) -> float:
        return statistics.median(typical(run, what, phases) for run in runs)

    products = {name: statistics.median(run["products"][name] for run in runs) for name in ("flops", "seconds", "cpu")}
    return {
        **{f"{phase}, s": middle("seconds", (phase,)) for phase in PHASES},
        "step, s": middle("seconds"),
        "step, CPU s": middle("cpu"),
        "tokens read, no gradient": middle("read"),
        "tokens read and trained": middle("trained"),
        "update, TFLOP": products["flops"] / 1e12,
        "update, share of the matrix rate": products["seconds"] / middle("seconds", ("update",)),
        "the same, CPU s": products["cpu"] / middle("cpu", ("update",)),
        "peak MB": max(run["peak_mb"] for run in runs),
        "above idle MB": max(run["peak_mb"] - run["idle_mb"] for run in runs),
        "tokens": statistics.mean(step["tokens"] for run in runs for step in run["steps"][1:]),
    }


def ratios(runs: list[Result], sides: dict[str, list[Result]]) -> dict[str, list[float]]:
    """Return how many times as fast as each peer the runs of a side are, in each round."""
    found = {}
    for other, others in sides.items():
        if not other.startswith("keel"):
            for what in ("seconds", "cpu"):
                pairs = zip(others, runs, strict=True)
                found[f"{other}, {what}"] = [typical(theirs, what) / typical(ours, what) for theirs, ours in pairs]
    return found


def show(result: Result) -> None:
    """Print a table, and how keel compares. Tokens per second have keel's tokens for every side, without padding."""
    sides = result["sides"]
    tokens = next((figures["tokens"] for side, figures in sides.items() if side.startswith("keel")), 0.0)
    table = Table("", *sides, title=result["task"])
    for name in (name for name in next(iter(sides.values())) if name != "tokens"):
        table.add_row(name, *(f"{figures[name]:.4g}" for figures in sides.values()))
    table.add_row("tokens/s", *(f"{tokens / figures['step, s']:.4g}" for figures in sides.values()))
    lines = []
    for side in (side for side in sides if side.startswith("keel")):
        for other, each in result["ratios"][side].items():
            spread = f"[{min(each):.2f}, {max(each):.2f}]"
            lines.append(f"{side} against {other}: {statistics.median(each):.2f} times as fast {spread}")
        for other in (other for other in sides if not other.startswith("keel")):
            lines.append(f"{side}: {sides[side]['peak MB'] / sides[other]['peak MB']:.0%} of the memory of {other}")
    table.caption = "\n".join(lines)
    Console().print(table)
