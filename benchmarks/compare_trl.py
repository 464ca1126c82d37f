"""Compare the PPO of keel with that of TRL 1.12, the last release with PPO: the same models, prompts and settings.

    python benchmarks/compare_trl.py --sizes 7M --json compare.json
    python benchmarks/compare_trl.py --sizes --stories FOLDER --openings openings.jsonl --steps 12
    python benchmarks/compare_trl.py --model FOLDER --openings openings.jsonl --lengths full
    python benchmarks/compare_trl.py --model FOLDER --algorithm dpo --pairs pairs.jsonl

Each task runs alternately, TRL, keel, TRL, keel, each in a separate process; the first step of each is not counted.
"same work" means four separate models in float32. "best" means a shared critic, and bfloat16 if this machine multiplies
it faster. TRL runs in a separate environment, which the first run creates (--venv).

--model measures the speed on any real model: PPO against TRL 1.12 and against a loop in plain transformers
(plain_ppo.py), and grpo, rloo, dpo, reward and sft against TRL 1.16. The tokens that the models of each side read are
printed, with padding. "share of the matrix rate" is the time of the matrix products of the update alone, measured after
the run in the same process, over the time of the update. The products of attention are not among them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from compare_model import FROM_PAIRS, compare
from rich.console import Console
from rich.table import Table
from tasks import SHAPES, Task, random_task, story_task

HERE = Path(__file__).parent
PINS = ("trl==1.12.0", "transformers==5.23.0")
PINS_AFTER_PPO = ("trl==1.16.0", "transformers==5.23.0")
SIDES = ("trl", "plain", "keel", "keel best")
PHASES = ("sample", "score and targets", "update", "step")


def main() -> None:
    options = parse_arguments()
    python = trl_python(Path(options.venv), PINS if options.algorithm == "ppo" else PINS_AFTER_PPO)
    rates = {
        name: matrix_rate(kind, options.threads) for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    Console().print("machine: " + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items()))
    narrow = ["policy.dtype=bfloat16", "rewards.0.dtype=bfloat16"] if rates["bf16"] > 1.3 * rates["fp32"] else []
    best = ["critic.sharing=shared", *narrow]
    if options.model:
        write(options, rates, best, compare(options, python, best))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.work or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        results = [measure(task, python, folder, best, options) for task in tasks(folder, options)]
    for result in results:
        show(result, rates["fp32"])
    write(options, rates, best, results)


def write(options: argparse.Namespace, rates: dict[str, float], best: list[str], results: list[Any]) -> None:
    if options.json:
        Path(options.json).write_text(json.dumps({"rates": rates, "best": best, "tasks": results}, indent=1))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=list(SHAPES), choices=list(SHAPES), help="random models")
    parser.add_argument("--lengths", nargs="+", default=["natural", "full"], choices=["natural", "full"])
    parser.add_argument("--stories", nargs="*", default=[], metavar="FOLDER", help="pre-trained models")
    parser.add_argument(
        "--openings", metavar="FILE", help="prompts for the pre-trained models: jsonl with a column `prompt`"
    )
    parser.add_argument("--model", metavar="FOLDER", help="compare the speed on this model only")
    parser.add_argument("--algorithm", default="ppo", choices=["ppo", "grpo", "rloo", *FROM_PAIRS], help="with --model")
    parser.add_argument(
        "--pairs", metavar="FILE", help="data of dpo, reward and sft: jsonl with prompt, chosen, rejected"
    )
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES, help="with --model")
    parser.add_argument("--response-tokens", type=int, default=64, help="with --model: longest response")
    parser.add_argument("--epochs", type=int, default=4, help="with --model: epochs of ppo")
    parser.add_argument("--minibatches", type=int, default=4, help="with --model: minibatches of ppo, grpo and rloo")
    parser.add_argument("--batch-size", type=int, default=64, help="responses per step; pairs of dpo, reward and sft")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side")
    parser.add_argument("--steps", type=int, default=3, help="steps of each run; the first is not counted")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--venv",
        help="environment with TRL, created if it does not exist (default: .venv-trl; for TRL 1.16 .venv-trl-reward)",
    )
    parser.add_argument("--work", help="keep models and results here")
    parser.add_argument("--json", help="write all results to this file")
    options = parser.parse_args()
    if options.stories and not options.openings:
        parser.error("--stories needs --openings")
    needed = "pairs" if options.algorithm in FROM_PAIRS else "openings"
    if options.model and not getattr(options, needed):
        parser.error(f"--algorithm {options.algorithm} needs --{needed}")
    if options.algorithm != "ppo" and not options.model:
        parser.error("--algorithm needs --model")
    options.venv = options.venv or (".venv-trl" if options.algorithm == "ppo" else ".venv-trl-reward")
    return options


def trl_python(folder: Path, pins: Sequence[str] = PINS) -> Path:
    """Return the interpreter of an environment with TRL and with keel's version of torch."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"installing {', '.join(pins)} into {folder}", flush=True)
        venv.create(folder, with_pip=True)
        version = torch.__version__.split("+")[0]
        for wanted in ([f"torch=={version}"], list(pins)):
            subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True)
    return python


def matrix_rate(kind: torch.dtype, threads: int) -> float:
    """Return floating-point operations per second of a matrix product, the best of five.

    The product grows until it takes 50 ms: without instructions for bfloat16, a large one would take a minute.
    """
    torch.set_num_threads(threads)
    size, seconds = 256, 0.0
    while seconds < 0.05 and size < 2048:
        size *= 2
        a, b = (torch.randn(size, size).to(kind) for _ in range(2))
        seconds = min(seconds_of(lambda: a @ b) for _ in range(5))  # noqa: B023 - called at once
    return 2 * size**3 / seconds


def seconds_of(act: Callable[[], Any]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def tasks(folder: Path, options: argparse.Namespace) -> list[Task]:
    found = [
        random_task(SHAPES[name], folder, length == "natural") for name in options.sizes for length in options.lengths
    ]
    found += [story_task(Path(model), Path(options.openings), folder) for model in options.stories]
    return [task.with_(steps=options.steps, threads=options.threads, batch_size=options.batch_size) for task in found]


def measure(task: Task, python: Path, folder: Path, best: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Run a task with both sides alternately, and measure the quality of the policies."""
    sides: dict[str, list[Any]] = {
        "trl": [[python, HERE / "trl_ppo.py"], []],
        "keel": [[sys.executable, HERE / "keel_ppo.py"], []],
        "keel best": [[sys.executable, HERE / "keel_ppo.py"], best],
    }
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for turn in range(options.rounds):
        for side, (command, changes) in sides.items():
            runs[side].append(run(task, side, command, changes, folder))
            print(
                f"{task.name}, {side}, run {turn + 1}: {runs[side][-1]['steps'][-1]['step']:.2f} s a step", flush=True
            )
    learned = {}
    if task.real_learning_rate:
        for side, (command, changes) in sides.items():
            run(task.with_(learning_rate=task.real_learning_rate), side, command, changes, folder)
        learned = quality(task, folder)
    return {
        "task": task.name,
        "batch_size": task.batch_size,
        "epochs": task.update_epochs,
        "sides": {side: summary(each, task) for side, each in runs.items()},
        "quality": learned,
        "params": sizes(task),
    }


def run(task: Task, side: str, command: list[Any], changes: list[str], folder: Path) -> dict[str, Any]:
    """Run one side in a separate process, and save its policy in a folder with the name of the side."""
    file, result, policy = task.write(folder / "task.json"), folder / "result.json", folder / policy_of(side)
    log = subprocess.run([*command, file, result, policy, *changes], capture_output=True, text=True)
    if log.returncode:
        raise SystemExit(f"{side} failed on {task.name}:\n{log.stderr[-3000:]}")
    return json.loads(result.read_text())


def policy_of(side: str) -> str:
    return f"policy-{side.replace(' ', '-')}"


def summary(runs: list[dict[str, Any]], task: Task) -> dict[str, float]:
    """Return medians over the counted steps of all runs."""
    steps = [step for run in runs for step in run["steps"][1:]]
    figures = {phase: statistics.median(step[phase] for step in steps) for phase in PHASES}
    tokens = statistics.mean(step["tokens"] for step in steps)
    return figures | {
        "responses/s": task.batch_size / figures["step"],
        "tokens/s": tokens / figures["step"],
        "tokens": tokens,
        "peak MB": max(run["peak_mb"] for run in runs),
        "above idle MB": max(run["peak_mb"] - run["idle_mb"] for run in runs),
    }


def sizes(task: Task) -> dict[str, float]:
    """Return the numbers of weights used by every token and by predicted tokens only, and the mean prompt length."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(task.policy) for kind in (AutoModelForCausalLM, AutoTokenizer))
    matrices = sum(p.numel() for name, p in model.base_model.named_parameters() if p.dim() > 1 and "embed" not in name)
    prompts = [json.loads(line)["prompt"] for line in Path(task.prompts).read_text().splitlines()]
    length = statistics.mean(len(tokenizer(prompt)["input_ids"]) for prompt in prompts)
    return {"trunk": matrices, "head": model.get_output_embeddings().weight.numel(), "prompt": length}


def quality(task: Task, folder: Path) -> dict[str, Any]:
    """Return the score of each side's policy on the same prompts with the same random numbers."""
    from keel.config import EvaluateConfig, parse
    from keel.evaluation.evaluate import evaluate_policies

    common = {"prompts": {"path": task.prompts}, "rewards": [{"model": task.reward}], "seed": 1}
    sampling = {"num_responses": 1, "batch_size": 256, "max_response_tokens": task.max_response_tokens}
    found = {}
    for side in ("keel", "keel best"):
        values = {"policy": str(folder / policy_of(side)), "against": str(folder / policy_of("trl")), **common}
        config = parse(EvaluateConfig, values | {"sampling": sampling, "output": str(folder / "evaluation.json")})
        figures = evaluate_policies(config)
        difference = {name: figures[f"score_difference{name}"] for name in ("", "_low", "_high")}
        found[side] = {
            "score": figures["policy"]["score"],
            "trl": figures["against"]["score"],
            "difference": difference,
        }
    return found


def show(result: dict[str, Any], rate: float) -> None:
    sides, params = result["sides"], result["params"]
    table = Table("", *sides, title=result["task"])
    for name in (*PHASES, "responses/s", "tokens/s", "tokens", "peak MB", "above idle MB"):
        table.add_row(name, *(f"{figures[name]:.4g}" for figures in sides.values()))
    notes = []
    for name in ("keel", "keel best"):
        ratio = sides[name]["responses/s"] / sides["trl"]["responses/s"]
        memory = sides[name]["peak MB"] / sides["trl"]["peak MB"]
        notes.append(f"{name}: {ratio:.2f} times the responses/s of TRL in {memory:.0%} of its memory.")
    tokens, epochs, trunks = sides["keel"]["tokens"], result["epochs"], 2
    read = tokens + result["batch_size"] * params["prompt"]
    work = 6 * epochs * (trunks * params["trunk"] * read + params["head"] * tokens)
    notes.append(f"keel's update: {work / sides['keel']['update'] / rate:.0%} of the matrix rate.")
    for name, judged in result["quality"].items():
        mean, low, high = judged["difference"].values()
        gained = f"{mean:+.3f} [{low:.3f}, {high:.3f}]"
        notes.append(f"{name} learned to score {judged['score']:.3f}, TRL {judged['trl']:.3f}: {gained}")
    table.caption = "\n".join(notes)
    Console().print(table)


if __name__ == "__main__":
    main()
