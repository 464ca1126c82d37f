"""Make a long run for the dashboard (5,000 steps, 300,000 responses of about 30 tokens, about 700 MB), and measure it.

python benchmarks/dashboard.py make runs/long        # writes the run folder
python benchmarks/dashboard.py measure runs/long     # times `keel serve` on it in chromium (needs playwright)
"""

import argparse
import json
import random
from pathlib import Path

WORDS = ["the", "your", "order", "arrived", "broken", "late", "chair", "lamp", "clock", "please", "thank", "you", "we"]
OTHERS = 1000  # different answers, whose tokens are worked out once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "measure"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--answers", type=int, default=60, help="responses of each step")
    given = parser.parse_args()
    if given.what == "make":
        make(given.folder, given.steps, given.answers)
    else:
        from dashboard_measure import measure

        measure(given.folder)


def make(folder: Path, steps: int, answers: int) -> None:
    """Write a run folder with the files that the dashboard reads, as `keel train` writes them."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"output: {folder}\nseed: 0\nsteps: {steps}\nrollout: {{batch_size: 64}}\n")
    (folder / "ended.json").write_text('{"standing": "finished", "what": ""}\n')
    draw = random.Random(0)
    bodies = [body(draw) for _ in range(OTHERS)]
    with (folder / "metrics.jsonl").open("w") as metrics, (folder / "rollouts.jsonl").open("w") as rollouts:
        for step in range(1, steps + 1):
            metrics.write(json.dumps({"step": step, **figures(draw, step / steps)}) + "\n")
            for _ in range(answers):
                rollouts.write(head(draw, step, step / steps) + draw.choice(bodies) + "\n")


def head(draw: random.Random, step: int, done: float) -> str:
    score = draw.gauss(3 * done, 1)
    short = {"step": step, "score": score, "kl": draw.gauss(20 * done, 2), "length": draw.randint(20, 40)}
    scores = {"model": score, "held_out": score + draw.gauss(-2 * done * done, 0.5)}
    return json.dumps({**short, "truncated": draw.random() < 0.02, "scores": scores})[:-1]


def body(draw: random.Random) -> str:
    """Return the rest of a line, from the prompt on."""
    count = draw.randint(20, 40)
    pieces = [f" {draw.choice(WORDS)}" for _ in range(count)]
    by_token = {
        name: [round(draw.gauss(0, 1), 5) for _ in pieces]
        for name in ("logprobs", "ref_logprobs", "values", "rewards", "advantages")
    }
    prompt = f"customer: my {draw.choice(WORDS)} number {draw.randint(1000, 1999)} {draw.choice(WORDS)}. agent:"
    tokens = [draw.randrange(1000) for _ in pieces]
    row = {"prompt": prompt, "response": "".join(pieces), "tokens": tokens, "pieces": pieces, **by_token}
    return ", " + json.dumps(row)[1:]


def figures(draw: random.Random, done: float) -> dict[str, float]:
    """Return the metrics of a step, about forty."""
    known = {
        "objective/scores": 3 * done + draw.gauss(0, 0.2),
        "objective/kl": 20 * done + draw.gauss(0, 0.5),
        "objective/entropy": 30 - 10 * done + draw.gauss(0, 0.5),
        "objective/scores_std": 1 + draw.gauss(0, 0.05),
        "response/length": 30 + draw.gauss(0, 1),
        "response/truncated": abs(draw.gauss(0.02, 0.01)),
        "policy/clipfrac": abs(draw.gauss(0.05, 0.02)),
        "policy/approx_kl": abs(draw.gauss(0.01, 0.003)),
        "critic/explained_variance": min(0.8, 4 * done) + draw.gauss(0, 0.05),
        "time/step_seconds": 8 + draw.gauss(0, 0.3),
    }
    return known | {f"more/figure_{number}": draw.gauss(number, 1) for number in range(30)}


if __name__ == "__main__":
    main()
