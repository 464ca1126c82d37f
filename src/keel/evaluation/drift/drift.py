"""Do a run's reward models still apply to the prompts of today? What `keel drift` does."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keel.config import DriftConfig
from keel.data.prompts import Prompt
from keel.evaluation.drift.novelty import Known
from keel.evaluation.drift.responses import ENOUGH, Desk, answer, logged, open_desk, some, table, training_prompts
from keel.evaluation.drift.verdict import Moved, comparable, compared, corrected, reasons, standing, too_few, unlikely
from keel.evaluation.judged import Judged
from keel.evaluation.slices import slices_of
from keel.run.folder import write_atomic
from keel.run.json_values import finite
from keel.run.output import require_writable
from keel.stats.two_samples import Numbers
from keel.world import World

RANKED = 4  # answers to a prompt that people are asked to rank
MOST_RANKED = 200  # prompts for them
ALARMING = ("in doubt", "does not apply")
ALL = "all"
SHARE = "share_of_prompts"


@dataclass(frozen=True)
class Side:
    """Answers of one time, and a value of each figure for every one of them."""

    judged: Judged
    values: dict[str, Numbers]  # figure -> [N]
    slices: dict[str, list[int]]  # `COLUMN=VALUE` -> rows

    def of(self, rows: Sequence[int]) -> dict[str, Numbers]:
        return {name: values[list(rows)] for name, values in self.values.items()}

    def share(self, name: str) -> dict[str, Numbers]:
        """1 for each row that is in the slice."""
        return {SHARE: np.isin(np.arange(len(self.judged.texts)), self.slices.get(name, [])).astype(np.float64)}


def drift(config: DriftConfig) -> dict[str, Any]:
    """Each figure of today's answers beside that of answers to training prompts, in all and by slices, and a verdict.

    Written to `config.output`, with the answers. Raises ConfigError, DataError or RewardError.
    """
    World.single()
    require_writable(config.output)
    if config.output:
        require_writable(to_rank_beside(config.output))
    desk = open_desk(config)
    training = training_prompts(desk, config.run)
    today, then = sides_of(config, desk, training)
    groups = {ALL: compared(then.values, today.values, config.seed)}
    for name, rows in today.slices.items():
        groups[name] = slice_tests(name, then, today.of(rows), config.seed)
        if column_of(name) in columns_of(then.slices):
            groups[name] |= compared(then.share(name), today.share(name), config.seed)
    found = corrected(groups)
    figures: dict[str, Any] = {
        "rows": {"training": len(then.judged.texts), "today": len(today.judged.texts)},
        "figures": found.pop(ALL),
        "slices": {
            name: {"rows": len(today.slices[name]), "of_training": of_training(name, then.slices), "figures": own}
            for name, own in found.items()
        },
        "notes": desk.notes,
    }
    figures["verdict"] = verdict(figures, then.slices)
    write(config, desk, figures, today)
    return figures


def column_of(name: str) -> str:
    """Of a slice `COLUMN=VALUE`."""
    return name.partition("=")[0]


def columns_of(slices: Iterable[str]) -> set[str]:
    return {column_of(name) for name in slices}


def of_training(name: str, before: Mapping[str, Sequence[int]]) -> int | None:
    """How many answers to training prompts are in the slice; None where those prompts lack the column."""
    return len(before.get(name, [])) if column_of(name) in columns_of(before) else None


def slice_tests(name: str, then: Side, today: dict[str, Numbers], seed: int) -> dict[str, Moved]:
    """Against the same slice of the training, or, where there is none, what can be asked without."""
    if name in then.slices:
        return compared(then.of(then.slices[name]), today, seed)
    return compared(comparable(then.values), today, seed)


def sides_of(config: DriftConfig, desk: Desk, training: Sequence[Prompt]) -> tuple[Side, Side]:
    """Today's answers, and fresh ones to training prompts."""
    known = Known([prompt.content for prompt in training])
    sample = some(training, max(ENOUGH, len(desk.player.prompts)), config.seed, "training")
    then = answer(desk, sample, config.seed, "training")
    now = logged(desk, config.answers) if config.answers else answer(desk, desk.player.prompts, config.seed, "today")
    columns = [name for name in config.slices if any(name in prompt.columns for prompt in sample)]
    if missing := [name for name in config.slices if name not in columns]:
        desk.notes.append(
            f"the training prompts have no column {', '.join(missing)}: of its slices only what is new can be seen"
        )
    values = table(desk, now, known, of_training=False), table(desk, then, known, of_training=True)
    if desk.reference is not None:
        for own in values:
            own["prompt_unlikely"] = unlikely(own["prompt_logprob"], values[1]["prompt_logprob"])
    return (
        Side(now, values[0], slices_of(now.prompts, config.slices)),
        Side(then, values[1], slices_of(sample, columns)),
    )


def verdict(figures: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """What it says of the reward models, of all prompts and of each slice, and why where that is no good news.

    A slice is in doubt at best where the training's prompts are told apart as well and none of them is in it; where
    they are not, the best that can be said is that there is nothing new in it.
    """
    slices: dict[str, str] = {}
    overall = standing(figures["figures"])
    because = {ALL: why(overall, figures["figures"])}
    for name, own in figures["slices"].items():
        told_apart = column_of(name) in columns_of(before)
        unknown = told_apart and name not in before
        slices[name] = standing(own["figures"])
        if slices[name] == "applies" and not told_apart:
            slices[name] = "nothing new"
        if unknown and slices[name] != "does not apply":
            slices[name] = "in doubt"
        new = ["none of the training prompts is of this kind"] * unknown
        because[name] = new + why(slices[name], own["figures"])
    moved = [name for name, each in slices.items() if each in ALARMING]
    return {"reward_model": overall, "slices": slices, "moved_slices": moved, "because": because}


def why(said: str, figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is behind a verdict that is no good news."""
    if said == "too few to say":
        return too_few(figures)
    return reasons(figures) if said in ALARMING else []


def write(config: DriftConfig, desk: Desk, figures: dict[str, Any], today: Side) -> None:
    """Figures and answers, and beside them the prompts that people should rank, with answers."""
    if not config.output:
        return
    output = Path(config.output)
    rows = to_rank(desk, figures["verdict"], today, config)
    if rows:
        figures["to_rank"] = {"file": str(to_rank_beside(config.output)), "rows": len(rows)}
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomic(to_rank_beside(config.output), lines)
    answers = [
        {
            "prompt": prompt.content,
            "response": texts[0],
            **{name: float(values[row]) for name, values in today.values.items()},
        }
        for row, (prompt, texts) in enumerate(zip(today.judged.prompts, today.judged.texts, strict=True))
    ]
    record = finite({"figures": figures, "answers": answers})
    write_atomic(output, json.dumps(record, ensure_ascii=False, indent=1) + "\n")


def to_rank_beside(output: str) -> Path:
    return Path(output).with_suffix(".rank.jsonl")


def to_rank(desk: Desk, said: Mapping[str, Any], today: Side, config: DriftConfig) -> list[dict[str, Any]]:
    """Rows for `keel rank`: the prompts of the slices that moved, or all if all did, with different answers each."""
    chosen = {row for name in said["moved_slices"] for row in today.slices[name]}
    if not chosen and said["reward_model"] not in ALARMING:
        return []
    rows = sorted(chosen) or list(range(len(today.judged.prompts)))
    prompts = some([today.judged.prompts[row] for row in rows], MOST_RANKED, config.seed, "rank")
    texts = answer(desk, prompts, config.seed, "rank", copies=RANKED).texts
    own = [[str(prompt.columns["response"])] if config.answers else [] for prompt in prompts]
    lines = []
    for prompt, given, drawn in zip(prompts, own, texts, strict=True):
        responses = list(dict.fromkeys([*given, *drawn]))[:RANKED]
        others = {name: prompt.columns[name] for name in config.slices if name in prompt.columns}
        if len(responses) > 1:
            lines.append({"prompt": prompt.content, "responses": responses, **others})
    return lines
