"""Make the quickstart's models, two reward models from different rankings, and two with wrong preferences."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from keel.config import QuickstartConfig, RewardConfig, SampleConfig, parse
from keel.evaluation.sample import sample_responses
from keel.quickstart.ranking import rank_responses
from keel.quickstart.report import read_lines
from keel.quickstart.run import (
    Quickstart,
    pretraining_settings,
    reward_settings,
    sampling_settings,
    sft_settings,
    write_jsonl,
    write_world,
)
from keel.supervised.reward import reward
from keel.supervised.sft import sft

FEW = 80  # rankings, of which a reward model learns what it can
HOT = 1.6  # temperature of more varied answers
Rows = Sequence[dict[str, Any]]


def longer_wins(rows: Rows) -> Rows:
    """Return the same responses, ranked by length only."""

    def ranks(responses: Sequence[str]) -> list[int]:
        lengths = [len(response.split()) for response in responses]
        return [1 + sum(other > length for other in lengths) for length in lengths]

    return [row | {"ranks": ranks(row["responses"])} for row in rows]


JUDGES: dict[str, tuple[Callable[[Rows, Rows], Rows], float]] = {
    "reward": (lambda rows, hot: rows[::2], 3.0),
    "second": (lambda rows, hot: [*rows[1::2], *hot[1::2]], 3.0),
    "few": (lambda rows, hot: rows[: 2 * FEW : 2], 6.0),
    "length": (lambda rows, hot: longer_wins(rows[::2]), 3.0),
}
"""Each reward model's rankings, out of all and of those of hot answers, and its epochs. `second` knows more kinds of
answers than the others, as a scorer that is held out to watch them should."""


def make_world(folder: Path, seed: int) -> Path:
    """Make language model, rankings and reward models of a seed, except those that exist."""
    run = Quickstart(parse(QuickstartConfig, {"output": str(folder), "seed": seed}))
    if not (folder / "hot/rankings.jsonl").exists():
        write_world(run)
        for settings in (pretraining_settings(run), sft_settings(run)):
            if not (Path(settings.output) / "model").exists():
                sft(settings)
        rank(run, "mild", 1.0)
        rank(run, "hot", HOT)
    for name in JUDGES:
        if not (folder / name / "model").exists():
            learn_judge(run, name)
    write_jsonl(folder / "data/one.jsonl", read_lines(folder / "data/rl.jsonl")[:1])
    return folder


def rank(run: Quickstart, name: str, temperature: float) -> None:
    """Rank new responses to the same prompts, in a separate folder."""
    values = sampling_settings(run).model_dump() | {"output": run.path(f"{name}/answers.jsonl")}
    values["sampling"]["temperature"] = temperature
    sample_responses(parse(SampleConfig, values))
    rank_responses(run.config, run.root / name / "answers.jsonl", run.root / name / "rankings.jsonl")


def learn_judge(run: Quickstart, name: str) -> None:
    choose, epochs = JUDGES[name]
    rankings = run.root / f"rankings-{name}.jsonl"
    everything, hot = (read_lines(run.root / folder / "rankings.jsonl") for folder in ("mild", "hot"))
    write_jsonl(rankings, choose(everything, hot))
    values = reward_settings(run).model_dump()
    values |= {"output": run.path(name), "epochs": epochs}
    values["data"]["path"] = str(rankings)
    figures = reward(parse(RewardConfig, values))
    print(f"{run.root.name} {name}: {json.dumps({key: round(value, 3) for key, value in figures.items()})}", flush=True)
