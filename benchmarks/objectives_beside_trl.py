"""Compare each objective of keel with that of TRL 1.16: the same weights, the same batch, one loss and its gradient.

    python benchmarks/objectives_beside_trl.py --model FOLDER --pairs pairs.jsonl

The batch has two groups of four responses of 12 to 20 tokens, with advantages of both signs, old log-probs that differ
from the current ones by noise of 0.3 nats, and reference log-probs of a perturbed copy of the model; and four short
pairs with different prompts. keel's side runs the code of `keel train`, `keel dpo`, `keel reward` and `keel sft`
(keel_objectives.py). TRL's side runs `compute_loss` of its trainers (trl_objectives.py), in a separate process and
environment. Both compute in float32.

The norms are those of torch, by which both sides clip: in float32, for 135M weights on a CPU 5e-5 too low.
"gradient" is the relative difference of the gradients themselves: of all vectors, and four rows of each matrix. The
command fails if a loss or norm differs by more than 1e-5 and the case has no reason why (objective_cases.py). All
cases took 25 minutes on two busy cores; --only runs some.

TRL 1.16 has no PPO (1.12 has; compare_trl.py measures it), A2C, REINFORCE or Plackett-Luce loss.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from compare_trl import PINS_AFTER_PPO, trl_python
from objective_cases import CASES, Case
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

HERE = Path(__file__).parent
TOLERANCE = 1e-5


def main() -> None:
    options = parse_arguments()
    python = trl_python(Path(options.venv), PINS_AFTER_PPO)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(options, python, Path(folder))
    show(results)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))
    failed = [row["name"] for row in results if row["unexplained"]]
    if failed:
        raise SystemExit(f"differences above {TOLERANCE:g}: {', '.join(failed)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a causal language model")
    parser.add_argument("--pairs", required=True, metavar="FILE", help="jsonl with prompt, chosen, rejected")
    parser.add_argument(
        "--venv", default=".venv-trl-reward", metavar="FOLDER", help="environment with TRL 1.16, created if missing"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="*", default=[], metavar="TEXT", help="cases whose name contains this")
    parser.add_argument("--json", metavar="FILE", help="write all results to this file")
    return parser.parse_args()


def measure(options: argparse.Namespace, python: Path, folder: Path) -> list[dict[str, Any]]:
    """Measure both sides, each in a separate process."""
    cases = [case for case in CASES if not options.only or any(text in case.name for text in options.only)]
    model, pairs = (str(Path(path).resolve()) for path in (options.model, options.pairs))
    job = {"model": model, "pairs": pairs, "seed": options.seed, "threads": options.threads}
    (folder / "job.json").write_text(json.dumps({**job, "cases": [asdict(case) for case in cases]}))
    sides = {"keel": sys.executable, "trl": python}  # keel first: it makes the batch
    keel, other = (run(side, interpreter, folder) for side, interpreter in sides.items())
    samples = [load_file(folder / f"{side}.safetensors") for side in sides]
    return [compare(case, keel[case.name], other[case.name], *samples) for case in cases]


def run(side: str, interpreter: Path | str, folder: Path) -> dict[str, dict[str, float]]:
    result = folder / f"{side}.json"
    command = [interpreter, HERE / f"{side}_objectives.py", folder / "job.json", result]
    log = subprocess.run(command, capture_output=True, text=True)
    if log.returncode:
        raise SystemExit(f"{side} failed:\n{log.stderr[-3000:]}")
    measured: dict[str, dict[str, float]] = json.loads(result.read_text())
    return measured


def compare(
    case: Case,
    keel: dict[str, float],
    other: dict[str, float],
    keel_samples: dict[str, torch.Tensor],
    other_samples: dict[str, torch.Tensor],
) -> dict[str, Any]:
    """Return the figures of one case. keel's are multiplied by the case's factor before they are compared."""
    names = sorted(name for name in other_samples if name.startswith(f"{case.name}/"))
    mine, theirs = (
        torch.cat([samples[name].double().flatten() for name in names]) for samples in (keel_samples, other_samples)
    )
    loss, norm = (relative(case.factor * keel[name], other[name]) for name in ("loss", "norm"))
    compared = [norm] if case.gradient_only else [loss, norm]
    return {
        "name": case.name,
        "keel": keel,
        "trl": other,
        "factor": case.factor,
        "loss": None if case.gradient_only else loss,
        "norm": norm,
        "gradient": float((case.factor * mine - theirs).norm() / theirs.norm()),
        "differs": case.differs,
        "unexplained": not case.differs and max(compared) > TOLERANCE,
        "note": case.note,
    }


def relative(value: float, expected: float) -> float:
    return abs(value - expected) / abs(expected)


def show(results: list[dict[str, Any]]) -> None:
    table = Table(
        "objective", "loss: keel", "TRL", "difference", "gradient norm: keel", "TRL", "difference", "gradient"
    )
    notes = []
    for row in results:
        number = ""
        if row["note"]:
            notes.append(row["note"])
            number = f" [{len(notes)}]"
        keel, other = row["keel"], row["trl"]
        table.add_row(
            row["name"] + number,
            f"{keel['loss']:.7g}",
            f"{other['loss']:.7g}",
            "" if row["loss"] is None else f"{row['loss']:.1e}",
            f"{keel['norm']:.7g}",
            f"{other['norm']:.7g}",
            f"{row['norm']:.1e}",
            f"{row['gradient']:.1e}",
        )
    console = Console(width=160)
    console.print(table)
    for number, note in enumerate(notes, start=1):
        console.print(f"[{number}] {note}", markup=False)
    clipped = {row["name"]: row["keel"]["clipped"] for row in results if "clipped" in row["keel"]}
    console.print("clipped: " + ", ".join(f"{name} {share:.0%}" for name, share in clipped.items()), markup=False)


if __name__ == "__main__":
    main()
