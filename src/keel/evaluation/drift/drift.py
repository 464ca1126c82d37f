"""Do a run's reward models still apply to the prompts of today? What `keel drift` does."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keel.config import DriftConfig
from keel.data.prompts import Prompt
from keel.evaluation.drift.measurement import (
    ENOUGH,
    DriftSetup,
    open_drift_setup,
    sample_and_score_prompts,
    score_logged_responses,
    some,
    table,
    training_prompts,
)
from keel.evaluation.drift.novelty import PromptWordPairs
from keel.evaluation.drift.verdict import (
    MetricShift,
    comparable,
    compare_metrics,
    correct_p_values,
    describe_shifts,
    standing,
    too_few,
    unlikely,
)
from keel.evaluation.judged import EvaluatedResponses
from keel.evaluation.slices import slice_rows
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
class MeasuredResponses:
    """Answers of one time, and a value of each figure for every one of them."""

    evaluated: EvaluatedResponses
    values: dict[str, Numbers]  # figure -> [N]
    slices: dict[str, list[int]]  # `COLUMN=VALUE` -> rows

    def select_rows(self, rows: Sequence[int]) -> dict[str, Numbers]:
        return {name: values[list(rows)] for name, values in self.values.items()}

    def share(self, name: str) -> dict[str, Numbers]:
        """1 for each row that is in the slice."""
        return {SHARE: np.isin(np.arange(len(self.evaluated.texts)), self.slices.get(name, [])).astype(np.float64)}


def drift(config: DriftConfig) -> dict[str, Any]:
    """Each figure of today's answers beside that of answers to training prompts, in all and by slices, and a verdict.

    Written to `config.output`, with the answers. Raises ConfigError, DataError or RewardError.
    """
    World.single()
    require_writable(config.output)
    if config.output:
        require_writable(to_rank_beside(config.output))
    setup = open_drift_setup(config)
    training = training_prompts(setup, config.run)
    today, then = sample_both_sides(config, setup, training)
    groups = {ALL: compare_metrics(then.values, today.values, config.seed)}
    for name, rows in today.slices.items():
        groups[name] = slice_tests(name, then, today.select_rows(rows), config.seed)
        if slice_column(name) in slice_columns(then.slices):
            groups[name] |= compare_metrics(then.share(name), today.share(name), config.seed)
    found = correct_p_values(groups)
    metrics: dict[str, Any] = {
        "rows": {"training": len(then.evaluated.texts), "today": len(today.evaluated.texts)},
        "figures": found.pop(ALL),
        "slices": {
            name: {"rows": len(today.slices[name]), "of_training": count_in_training(name, then.slices), "figures": own}
            for name, own in found.items()
        },
        "notes": setup.notes,
    }
    metrics["verdict"] = drift_verdict(metrics, then.slices)
    write_drift(config, setup, metrics, today)
    return metrics


def slice_column(name: str) -> str:
    """Of a slice `COLUMN=VALUE`."""
    return name.partition("=")[0]


def slice_columns(slices: Iterable[str]) -> set[str]:
    return {slice_column(name) for name in slices}


def count_in_training(name: str, before: Mapping[str, Sequence[int]]) -> int | None:
    """How many answers to training prompts are in the slice; None where those prompts lack the column."""
    return len(before.get(name, [])) if slice_column(name) in slice_columns(before) else None


def slice_tests(name: str, then: MeasuredResponses, today: dict[str, Numbers], seed: int) -> dict[str, MetricShift]:
    """Against the same slice of the training, or, where there is none, what can be asked without."""
    if name in then.slices:
        return compare_metrics(then.select_rows(then.slices[name]), today, seed)
    return compare_metrics(comparable(then.values), today, seed)


def sample_both_sides(
    config: DriftConfig, setup: DriftSetup, training: Sequence[Prompt]
) -> tuple[MeasuredResponses, MeasuredResponses]:
    """Today's answers, and fresh ones to training prompts."""
    known = PromptWordPairs([prompt.content for prompt in training])
    sample = some(training, max(ENOUGH, len(setup.policy.prompts)), config.seed, "training")
    then = sample_and_score_prompts(setup, sample, config.seed, "training")
    now = (
        score_logged_responses(setup, config.answers)
        if config.answers
        else sample_and_score_prompts(setup, setup.policy.prompts, config.seed, "today")
    )
    columns = [name for name in config.slices if any(name in prompt.columns for prompt in sample)]
    if missing := [name for name in config.slices if name not in columns]:
        setup.notes.append(
            f"the training prompts have no column {', '.join(missing)}: of its slices only what is new can be seen"
        )
    values = table(setup, now, known, of_training=False), table(setup, then, known, of_training=True)
    if setup.reference is not None:
        for own in values:
            own["prompt_unlikely"] = unlikely(own["prompt_logprob"], values[1]["prompt_logprob"])
    return (
        MeasuredResponses(now, values[0], slice_rows(now.prompts, config.slices)),
        MeasuredResponses(then, values[1], slice_rows(sample, columns)),
    )


def drift_verdict(metrics: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """What it says of the reward models, of all prompts and of each slice, and why where that is no good news.

    A slice is in doubt at best where the training's prompts are told apart as well and none of them is in it; where
    they are not, the best that can be said is that there is nothing new in it.
    """
    slices: dict[str, str] = {}
    overall = standing(metrics["figures"])
    because = {ALL: verdict_reasons(overall, metrics["figures"])}
    for name, own in metrics["slices"].items():
        told_apart = slice_column(name) in slice_columns(before)
        unknown = told_apart and name not in before
        slices[name] = standing(own["figures"])
        if slices[name] == "applies" and not told_apart:
            slices[name] = "nothing new"
        if unknown and slices[name] != "does not apply":
            slices[name] = "in doubt"
        new = ["none of the training prompts is of this kind"] * unknown
        because[name] = new + verdict_reasons(slices[name], own["figures"])
    moved = [name for name, each in slices.items() if each in ALARMING]
    return {"reward_model": overall, "slices": slices, "moved_slices": moved, "because": because}


def verdict_reasons(said: str, metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is behind a verdict that is no good news."""
    if said == "too few to say":
        return too_few(metrics)
    return describe_shifts(metrics) if said in ALARMING else []


def write_drift(config: DriftConfig, setup: DriftSetup, metrics: dict[str, Any], today: MeasuredResponses) -> None:
    """Figures and answers, and beside them the prompts that people should rank, with answers."""
    if not config.output:
        return
    output = Path(config.output)
    rows = to_rank(setup, metrics["verdict"], today, config)
    if rows:
        metrics["to_rank"] = {"file": str(to_rank_beside(config.output)), "rows": len(rows)}
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomic(to_rank_beside(config.output), lines)
    responses = [
        {
            "prompt": prompt.content,
            "response": texts[0],
            **{name: float(values[row]) for name, values in today.values.items()},
        }
        for row, (prompt, texts) in enumerate(zip(today.evaluated.prompts, today.evaluated.texts, strict=True))
    ]
    record = finite({"figures": metrics, "answers": responses})
    write_atomic(output, json.dumps(record, ensure_ascii=False, indent=1) + "\n")


def to_rank_beside(output: str) -> Path:
    return Path(output).with_suffix(".rank.jsonl")


def to_rank(
    setup: DriftSetup, said: Mapping[str, Any], today: MeasuredResponses, config: DriftConfig
) -> list[dict[str, Any]]:
    """Rows for `keel rank`: the prompts of the slices that moved, or all if all did, with different answers each."""
    chosen = {row for name in said["moved_slices"] for row in today.slices[name]}
    if not chosen and said["reward_model"] not in ALARMING:
        return []
    rows = sorted(chosen) or list(range(len(today.evaluated.prompts)))
    prompts = some([today.evaluated.prompts[row] for row in rows], MOST_RANKED, config.seed, "rank")
    texts = sample_and_score_prompts(setup, prompts, config.seed, "rank", copies=RANKED).texts
    own = [[str(prompt.columns["response"])] if config.answers else [] for prompt in prompts]
    lines = []
    for prompt, given, drawn in zip(prompts, own, texts, strict=True):
        responses = list(dict.fromkeys([*given, *drawn]))[:RANKED]
        others = {name: prompt.columns[name] for name in config.slices if name in prompt.columns}
        if len(responses) > 1:
            lines.append({"prompt": prompt.content, "responses": responses, **others})
    return lines
