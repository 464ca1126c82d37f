"""Measure how time and memory of a PPO step grow with batch, response length, model size, group size and vocabulary.

    python benchmarks/growth.py --picture docs/growth.png --json growth.json

One size at a time differs from the base: 32 responses of 32 tokens, a Llama of 128 hidden units, 4 layers and 4,096
words, four separate models in float32 (groups: grpo, which has no critic). Every run is a separate process. The
exponent is the log-log slope between the two largest sizes: 1 is linear.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tasks import Shape, Task, random_task

HERE = Path(__file__).parent
BASE = Shape(128, 4)
MODELS = (Shape(64, 2), BASE, Shape(256, 6), Shape(512, 8))


@dataclass(frozen=True)
class Axis:
    """A size that grows: its values, and the job for each."""

    name: str
    sizes: tuple[int, ...]
    job: Callable[[int, Path], tuple[Task, list[str]]]


def base(folder: Path, shape: Shape = BASE) -> Task:
    return random_task(shape, folder, natural=False, max_response_tokens=32).with_(batch_size=32)


def answers(count: int, folder: Path) -> tuple[Task, list[str]]:
    return base(folder).with_(batch_size=count), []


def length(tokens: int, folder: Path) -> tuple[Task, list[str]]:
    return base(folder).with_(max_response_tokens=tokens), []


def model(weights: int, folder: Path) -> tuple[Task, list[str]]:
    [shape] = [shape for shape in MODELS if trunk_weights(shape) == weights]
    return base(folder, shape), []


def group(size: int, folder: Path) -> tuple[Task, list[str]]:
    return base(folder), ["algorithm.name=grpo", f"rollout.group_size={size}"]


def vocabulary(words: int, folder: Path) -> tuple[Task, list[str]]:
    return base(folder, Shape(BASE.hidden, BASE.layers, words)), []


def trunk_weights(shape: Shape) -> int:
    """Return the number of weights in the layers: four matrices of attention, three of three times the width."""
    return shape.layers * shape.hidden**2 * (4 + 3 * 3)


AXES = (
    Axis("answers a step", (8, 16, 32, 64, 128), answers),
    Axis("tokens an answer", (16, 32, 64, 128, 256), length),
    Axis("weights in the layers", tuple(map(trunk_weights, MODELS)), model),
    Axis("answers a group (grpo)", (2, 4, 8, 16), group),
    Axis("words of the vocabulary", (512, 4096, 32_768, 150_000), vocabulary),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, default=3, help="steps of each run; the fastest one except the first is reported"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--picture", help="draw the curves here (png)")
    parser.add_argument("--json", help="write all results to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = {axis.name: [measure(axis, size, Path(scratch), options) for size in axis.sizes] for axis in AXES}
    for name, rows in found.items():
        show(name, rows)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))
    if options.picture:
        draw(found, Path(options.picture))


def measure(axis: Axis, size: int, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    task, changes = axis.job(size, folder)
    file, result = task.with_(steps=options.steps, threads=options.threads).write(folder / "task.json"), folder / "r"
    command = [sys.executable, HERE / "keel_ppo.py", file, result, "", *changes]
    log = subprocess.run(command, capture_output=True, text=True)
    if log.returncode:
        raise SystemExit(f"{axis.name} {size} failed:\n{log.stderr[-3000:]}")
    figures = json.loads(result.read_text())
    step = min(figures["steps"][1:], key=lambda step: step["step"])
    row = {"size": size, "seconds": step["step"], "update": step["update"], "sample": step["sample"]}
    row["above idle MB"] = figures["peak_mb"] - figures["idle_mb"]
    print(f"{axis.name} {size:,}: {row['seconds']:.2f} s, {row['above idle MB']:.0f} MB", flush=True)
    return row


def exponent(rows: list[dict[str, float]], name: str) -> float:
    before, last = rows[-2:]
    return math.log(last[name] / before[name]) / math.log(last["size"] / before["size"])


def show(name: str, rows: list[dict[str, float]]) -> None:
    table = Table(name, "seconds a step", "update", "sample", "MB above idle")
    for row in rows:
        table.add_row(
            f"{row['size']:,}", *(f"{row[key]:.3g}" for key in ("seconds", "update", "sample", "above idle MB"))
        )
    table.caption = f"exponent: seconds {exponent(rows, 'seconds'):.2f}, memory {exponent(rows, 'above idle MB'):.2f}"
    Console().print(table)


def short(size: float) -> str:
    """Format a number: 1,024, 150k, 5.1M."""
    return f"{size / 1e6:.1f}M" if size >= 1e6 else f"{size / 1e3:.0f}k" if size >= 1e4 else f"{size:,.0f}"


def draw(found: dict[str, list[dict[str, Any]]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(found), figsize=(3.2 * len(found), 5.4), layout="constrained")
    for column, (name, rows) in enumerate(found.items()):
        sizes = [row["size"] for row in rows]
        for row, (key, label) in enumerate((("seconds", "seconds a step"), ("above idle MB", "MB above idle"))):
            place, values = axes[row, column], [each[key] for each in rows]
            place.loglog(sizes, values, "o-", color="#1f6f8b", label="measured")
            place.loglog(sizes, [values[-1] * size / sizes[-1] for size in sizes], ":", color="#999999", label="linear")
            place.set_xticks(sizes, [short(size) for size in sizes], fontsize=7)
            place.minorticks_off()
            place.grid(alpha=0.25)
            place.spines[["top", "right"]].set_visible(False)
            place.set_xlabel(name if row else "")
            place.set_ylabel(label if column == 0 else "")
    axes[0, 0].legend(frameon=False)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
