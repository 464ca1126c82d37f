"""Files beside a reward model: the verdict of its gate, its scores of held-out rankings, and their range."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from keel.config import GATES
from keel.data.preferences import Ranking, prompt_key
from keel.errors import ConfigError
from keel.run.folder import RunFolder, write_atomic
from keel.stats.preference_metrics import Scores
from keel.terminal import print_line

GATE_FILE, HELD_OUT_FILE, RANGE_FILE = "gate.json", "held_out.jsonl", "range.json"
RANGE = ("score_lowest", "score_low", "score_median", "score_high", "score_highest", "score_std", "longest")
"""The metrics that `write_range` saves."""
FEWEST_PROMPTS = 10  # with fewer, intervals miss their coverage (docs/evaluation.md, "Coverage")
FEWEST_PAIRS = 100  # for `ece`: with fewer, a model with a calibration error of 0.2 may pass by chance


def check_held_out(gate: Mapping[str, float], held_out: Sequence[Ranking]) -> None:
    """Check before training that there is enough held-out data for the gate. Raises ConfigError."""
    prompts = len({prompt_key(ranking.prompt) for ranking in held_out})
    pairs = sum(len(ranking.pairs) for ranking in held_out)
    fix = "raise data.eval_fraction or collect more rankings"
    if gate and prompts < FEWEST_PROMPTS:
        raise ConfigError(f"needs at least {FEWEST_PROMPTS} held-out prompts, has {prompts}", where="gate", fix=fix)
    for name in gate:
        if name.startswith("ece") and pairs < FEWEST_PAIRS:
            reason = f"needs at least {FEWEST_PAIRS} held-out pairs, has {pairs}"
            raise ConfigError(reason, where=f"gate.{name}", fix=fix)


def shortfalls(gate: Mapping[str, float], metrics: Mapping[str, float]) -> list[str]:
    """Return a line such as `accuracy 0.61 is not >= 0.65` for each demand that is not met.

    Raises ConfigError if nothing was held out.
    """
    lines = []
    for name, bound in gate.items():
        metric, sign = GATES[name]
        if metric not in metrics:
            raise ConfigError("a gate needs held-out prompts", where=f"gate.{name}", fix="set data.eval_fraction")
        value = metrics[metric]
        if not (value >= bound if sign == ">=" else value <= bound):
            lines.append(f"{name} {value:.4g} is not {sign} {bound:g}")
    return lines


def write_gate(folder: Path, gate: Mapping[str, float], failed: list[str]) -> None:
    """Write the gate and its verdict into the model's folder."""
    text = json.dumps({"gate": dict(gate), "passed": not failed, "failed": failed}, indent=1)
    (folder / GATE_FILE).write_text(text + "\n", encoding="utf-8")


def require_gate_pass(model: str, ungated: bool = False) -> None:
    """Raise ConfigError for a reward model that failed its gate. With `ungated`, only print a line.

    A model without a gate passes.
    """
    path = Path(model) / GATE_FILE
    if not path.is_file():
        return
    try:
        verdict = json.loads(path.read_text(encoding="utf-8"))
        passed, failed = verdict["passed"], "; ".join(verdict["failed"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "the verdict of the gate cannot be read",
            where=str(path),
            fix="train the reward model again, or restore the file",
        ) from error
    if not passed and ungated:
        print_line(f"{model} failed its gate ({failed}) and is used anyway (ungated: true)")
    elif not passed:
        raise ConfigError(
            f"the reward model failed its gate: {failed}",
            where=model,
            fix="train a better one (its report.html shows where it fails), or set ungated: true in this scorer",
        )


def write_held_out(
    folder: RunFolder,
    rankings: Sequence[Ranking],
    scores: Scores,
    member_scores: Sequence[Sequence[Sequence[float]]] | None = None,
) -> None:
    """Write the held-out rankings with their scores. Raises CheckpointError.

    Args:
        member_scores: of an ensemble: the scores [members, responses] of each ranking.
    """
    rows = [asdict(ranking) | {"scores": row} for ranking, row in zip(rankings, scores, strict=True)]
    for row, members in zip(rows, member_scores or [], strict=bool(member_scores)):
        row["member_scores"] = members
    write_atomic(folder.path / HELD_OUT_FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_range(folder: Path, metrics: Mapping[str, float]) -> None:
    """Write the range of the held-out scores. Without held-out rankings, write no file."""
    limits = {name: metrics[name] for name in RANGE if name in metrics}
    if limits:
        (folder / RANGE_FILE).write_text(json.dumps(limits, indent=1) + "\n", encoding="utf-8")


def read_range(model: str) -> dict[str, float] | None:
    """Read the range of the scores; None for a model without one. Raises ConfigError when it cannot be read."""
    path = Path(model) / RANGE_FILE
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return {name: float(saved[name]) for name in RANGE}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError("the range of its scores cannot be read", str(path), "remove the file") from error
