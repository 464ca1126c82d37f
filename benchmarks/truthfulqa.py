"""Compare reward models on the human labels of TruthfulQA: a plain fine-tune by TRL, and keel's best.

    python benchmarks/truthfulqa.py --pairs truthfulqa_pairs.jsonl --rankings truthfulqa_rankings.jsonl \\
        --trunks stories260K tinystories-656K

A fifth of the questions is held out, drawn as `keel reward` does, or the questions of other files (--held-out-pairs and
--held-out-rankings). TRL's RewardTrainer learns the pairs of the other questions: three passes at 1e-3, otherwise its
defaults. keel learns the same pairs, or the rankings that they were made from, with the settings below. The same code
evaluates all on the same pairs and rankings.

The 95% intervals are over questions, of the mean over seeds. They do not include the variation between seeds, which is
large. Calibrated: the scores of each half of the questions are divided by the temperature that fits the other half.
Seconds are processor time of the training, for keel with the evaluations between the passes. Finished runs are in
--work and are not repeated. TRL runs in a separate environment, which the first run creates (--venv).
"""

import argparse
import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from compare_reward import PINS
from compare_trl import trl_python
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from keel.config import RewardConfig, parse
from keel.data.preferences import Ranking, load_rankings, prompt_key, split_by_prompt
from keel.models.ensemble import load_reward_model
from keel.stats.preference_metrics import Scores, baselines, build_pairs, final_metrics, response_lengths
from keel.supervised.reward import reward

HERE = Path(__file__).parent
KINDS = ("pairs", "rankings")
BASELINE = "TRL, pairs"
TRL = {"epochs": 3, "learning_rate": 1e-3}
SHARED = """
template: "{prompt}\\n{response}"
center_coef: 0.01
optim: {learning_rate: 0.001, schedule: linear}
"""
RECIPES = {
    "keel, the same pairs": ("pairs", "{loss: pairwise, epochs: 2, batch_size: 32}"),
    "keel, ensemble on the same pairs": (
        "pairs",
        "{loss: pairwise, epochs: 2, batch_size: 32, members: 4, member_models: []}",
    ),
    "keel, rankings": ("rankings", "{loss: listwise, epochs: 3, batch_size: 16}"),
    "keel, ensemble on rankings": ("rankings", "{loss: listwise, epochs: 3, batch_size: 16, members: 4}"),
}
"""What `keel reward` is told: the file to learn, and its settings besides SHARED. A single model starts from the first
trunk, as TRL does; an ensemble from all in turn, unless it says member_models: []."""
ROUNDS = 2_000


@dataclass(frozen=True)
class Run:
    """One trained scorer: its scores of every held-out response, and its cost."""

    seconds: float
    scores: dict[tuple[str, str], float]


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    write_split(work, options)
    python = trl_python(Path(options.venv), PINS)
    runs: dict[str, list[Run]] = {}
    for seed in range(options.seeds):
        runs.setdefault(BASELINE, []).append(trl_run(python, work, seed, options))
        for name in RECIPES:
            if "members" not in RECIPES[name][1] or seed == 0:
                runs.setdefault(name, []).append(keel_run(name, work, seed, options))
    for kind in KINDS:
        show(kind, work, runs)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", required=True, metavar="FILE", help="jsonl: prompt, chosen, rejected")
    parser.add_argument("--rankings", required=True, metavar="FILE", help="jsonl: prompt, responses, scores")
    parser.add_argument(
        "--held-out-pairs", metavar="FILE", help="evaluate on these pairs, and learn from all of --pairs"
    )
    parser.add_argument("--held-out-rankings", metavar="FILE", help="evaluate on these rankings too")
    parser.add_argument(
        "--trunks", nargs="+", required=True, metavar="FOLDER", help="pre-trained models; TRL uses the first"
    )
    parser.add_argument("--seeds", type=int, default=2, help="runs of each single model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", default="runs/truthfulqa", help="keep data, models and scores here")
    parser.add_argument("--venv", default=".venv-trl-reward", help="environment with TRL; created if it does not exist")
    return parser.parse_args()


def write_split(work: Path, options: argparse.Namespace) -> None:
    """train-KIND.jsonl, held_out-KIND.jsonl, and answers.jsonl: every held-out response once, by question."""
    answers: dict[str, dict[str, None]] = {}
    for kind in KINDS:
        rows, other = read(getattr(options, kind)), getattr(options, f"held_out_{kind}")
        sides = (rows, read(other)) if other else split_by_prompt(rows, lambda row: row["prompt"], 0.2, 0)
        for name, side in zip(("train", "held_out"), sides, strict=True):
            write(work / f"{name}-{kind}.jsonl", side)
        for row in sides[1]:
            texts = row.get("responses") or [row["chosen"], row["rejected"]]
            answers.setdefault(row["prompt"], {}).update(dict.fromkeys(texts))
    write(work / "answers.jsonl", [{"prompt": prompt, "responses": list(texts)} for prompt, texts in answers.items()])


def trl_run(python: Path, work: Path, seed: int, options: argparse.Namespace) -> Run:
    task, result = work / f"trl-{seed}.task.json", work / f"trl-{seed}.json"
    if not result.exists():
        job = TRL | {"model": options.trunks[0], "seed": seed, "threads": options.threads}
        files = {"pairs": "train-pairs", "held_out": "held_out-pairs", "answers": "answers"}
        job |= {name: str(work.resolve() / f"{file}.jsonl") for name, file in files.items()}
        task.write_text(json.dumps(job))
        log = subprocess.run([python, HERE / "trl_truthfulqa.py", task, result], capture_output=True, text=True)
        if log.returncode:
            raise SystemExit(f"TRL failed:\n{log.stderr[-3000:]}")
    found = json.loads(result.read_text())
    return Run(found["seconds"], by_text(read(work / "answers.jsonl"), found["scores"]))


def keel_run(name: str, work: Path, seed: int, options: argparse.Namespace) -> Run:
    kind, own = RECIPES[name]
    title = f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    result, rows = work / f"{title}.json", read(work / "answers.jsonl")
    if not result.exists():
        given = yaml.safe_load(SHARED) | yaml.safe_load(own)
        given |= {"model": options.trunks[0], "seed": seed, "output": str(work / title)}
        if "members" in given:
            given.setdefault("member_models", options.trunks)
        data = {"path": str(work / f"train-{kind}.jsonl"), "eval_path": str(work / f"held_out-{kind}.jsonl")}
        start = time.process_time()
        reward(parse(RewardConfig, given | {"data": data}), resume=(work / title).exists())
        seconds = time.process_time() - start
        model = load_reward_model(str(work / title / "model"))
        scores = [model.score([row["prompt"]] * len(row["responses"]), row["responses"]).tolist() for row in rows]
        result.write_text(json.dumps({"seconds": seconds, "scores": scores}))
    found = json.loads(result.read_text())
    return Run(found["seconds"], by_text(rows, found["scores"]))


def show(kind: str, work: Path, runs: dict[str, list[Run]]) -> None:
    """Print a table of means over the runs of each row. "ahead" is computed question by question."""
    train, held_out = (load_rankings(str(work / f"{side}-{kind}.jsonl")) for side in ("train", "held_out"))
    train, held_out = ([ranking for ranking in side if ranking.pairs] for side in (train, held_out))
    facts = baselines(held_out, train)
    columns = ("accuracy", "ahead of TRL", "loss", "calibrated", "ECE", "calibrated", "seconds", "runs")
    title = f"{len({prompt_key(ranking.prompt) for ranking in held_out})} held-out questions: {kind}"
    table = Table("", *columns, title=title)
    longer = [[facts["length_sign"] * value for value in row] for row in response_lengths(held_out)]
    weights, right = by_question([longer], held_out)
    rival = by_question([scores_of(run, held_out) for run in runs[BASELINE]], held_out)[1]
    table.add_row("length alone", spread(right, weights), spread(right - rival, weights), *[""] * 6)
    for name, row in runs.items():
        scores = [scores_of(run, held_out) for run in row]
        right = by_question(scores, held_out)[1]
        figures = [final_metrics(values, held_out, facts) for values in scores]
        keys = ("loss", "calibrated_loss", "calibration_error", "calibrated_error")
        cells = [f"{np.mean([figure[key] for figure in figures]):.3f}" for key in keys]
        seconds = f"{np.mean([run.seconds for run in row]):.0f}"
        ahead = "" if name == BASELINE else spread(right - rival, weights)
        table.add_row(name, spread(right, weights), ahead, *cells, seconds, str(len(row)))
    Console(width=150).print(table)


def scores_of(run: Run, held_out: Sequence[Ranking]) -> list[list[float]]:
    return [[run.scores[prompt_key(ranking.prompt), answer] for answer in ranking.responses] for ranking in held_out]


def by_text(rows: Sequence[dict[str, Any]], scores: Sequence[Sequence[float]]) -> dict[tuple[str, str], float]:
    """Return the score of each response to each question."""
    return {
        (prompt_key(row["prompt"]), answer): score
        for row, values in zip(rows, scores, strict=True)
        for answer, score in zip(row["responses"], values, strict=True)
    }


def by_question(runs: Sequence[Scores], held_out: Sequence[Ranking]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the weights of the questions, which sum to 1, and weight times mean accuracy over the runs. -> [Q], [Q]"""
    keys = [prompt_key(ranking.prompt) for ranking in held_out]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    questions = np.array([numbers[key] for key in keys])
    all_pairs = [build_pairs(scores, held_out) for scores in runs]
    weights = np.bincount(questions[all_pairs[0].rankings], all_pairs[0].weights)
    right = [np.bincount(questions[pairs.rankings], pairs.weights * pairs.wins) for pairs in all_pairs]
    return weights, np.mean(right, axis=0)


def spread(values: NDArray[Any], weights: NDArray[Any]) -> str:
    """Return the sum of values over the sum of weights, and its 95% bootstrap interval over questions (Efron 1979)."""
    drawn = np.random.default_rng(0).integers(len(values), size=(ROUNDS, len(values)))
    low, high = np.percentile(values[drawn].sum(1) / weights[drawn].sum(1), [2.5, 97.5])
    return f"{values.sum():.3f} [{low:.3f}, {high:.3f}]"


def read(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
