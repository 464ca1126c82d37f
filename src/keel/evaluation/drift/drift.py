"""Compare responses to today's prompts with responses to training prompts (`keel drift`)."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from keel.config import DriftConfig
from keel.data.prompts import Prompt
from keel.evaluation.drift.measurement import (
    ENOUGH,
    DriftSetup,
    choose_prompts,
    metric_values,
    open_drift_setup,
    sample_and_score_prompts,
    score_logged_responses,
    training_prompts,
)
from keel.evaluation.drift.novelty import PromptWordPairs
from keel.evaluation.drift.verdict import (
    MetricShift,
    comparable_metrics,
    compare_metrics,
    correct_p_values,
    describe_shifts,
    explain_too_few,
    mark_unlikely,
    model_verdict,
)
from keel.evaluation.judged import EvaluatedResponses
from keel.evaluation.slices import slice_rows
from keel.run.folder import write_atomic
from keel.run.json_values import replace_non_finite
from keel.run.output import require_writable
from keel.stats.two_samples import Numbers
from keel.world import World, lost_process_reported, raise_together

RANKED = 4  # responses to each prompt that people are asked to rank
MOST_RANKED = 200  # prompts that people are asked to rank
ALARMING = ("in doubt", "does not apply")
ALL = "all"
SHARE = "share_of_prompts"


@dataclass(frozen=True)
class MeasuredResponses:
    """The responses of one side (training or today) and their metrics."""

    evaluated: EvaluatedResponses
    values: dict[str, Numbers]  # metric -> [N]
    slices: dict[str, list[int]]  # `COLUMN=VALUE` -> rows

    def select_rows(self, rows: Sequence[int]) -> dict[str, Numbers]:
        return {name: values[list(rows)] for name, values in self.values.items()}

    def share(self, name: str) -> dict[str, Numbers]:
        """Return 1 for each row in the slice, and 0 for the others, under the name SHARE."""
        return {SHARE: np.isin(np.arange(len(self.evaluated.texts)), self.slices.get(name, [])).astype(np.float64)}


def drift(config: DriftConfig) -> dict[str, Any]:
    """Compare each metric of today's responses with that of responses to training prompts, in total and by slice.

    Returns the comparisons and a verdict. They are written to `config.output`, together with the responses. Raises
    ConfigError, DataError or RewardError.
    """
    world = World.from_environment()
    with lost_process_reported():
        world.from_main(partial(check_drift_output, config))
        setup = open_drift_setup(config, world)
        training = raise_together(world, partial(training_prompts, setup, config.run))
        today, then = sample_both_sides(config, setup, training)
        metrics = dict(world.from_main(partial(compute_drift, config, setup, then, today)))
        if config.output:
            rows = rows_to_rank(setup, metrics["verdict"], today, config)
            if rows:
                metrics["to_rank"] = {"file": str(ranking_file(config.output)), "rows": len(rows)}
            world.from_main(partial(write_drift, config.output, metrics, today, rows))
    return metrics


def check_drift_output(config: DriftConfig) -> None:
    """Check that the output files can be written, before any model is loaded. Raises ConfigError."""
    require_writable(config.output)
    if config.output:
        require_writable(ranking_file(config.output))


def compute_drift(
    config: DriftConfig, setup: DriftSetup, then: MeasuredResponses, today: MeasuredResponses
) -> dict[str, Any]:
    """Compare both sides in total and by slice, and reach the verdict."""
    groups = {ALL: compare_metrics(then.values, today.values, config.seed)}
    for name, rows in today.slices.items():
        groups[name] = compare_slice(name, then, today.select_rows(rows), config.seed)
        if slice_column(name) in slice_columns(then.slices):
            groups[name] |= compare_metrics(then.share(name), today.share(name), config.seed)
    corrected = correct_p_values(groups)
    metrics: dict[str, Any] = {
        "rows": {"training": len(then.evaluated.texts), "today": len(today.evaluated.texts)},
        "figures": corrected.pop(ALL),
        "slices": {
            name: {
                "rows": len(today.slices[name]),
                "of_training": count_in_training(name, then.slices),
                "figures": shifts,
            }
            for name, shifts in corrected.items()
        },
        "notes": setup.notes,
    }
    metrics["verdict"] = drift_verdict(metrics, then.slices)
    return metrics


def slice_column(name: str) -> str:
    """Return the column of a slice `COLUMN=VALUE`."""
    return name.partition("=")[0]


def slice_columns(slices: Iterable[str]) -> set[str]:
    return {slice_column(name) for name in slices}


def count_in_training(name: str, training_slices: Mapping[str, Sequence[int]]) -> int | None:
    """Count the responses to training prompts in the slice. None if the training prompts lack the column."""
    return len(training_slices.get(name, [])) if slice_column(name) in slice_columns(training_slices) else None


def compare_slice(name: str, then: MeasuredResponses, today: dict[str, Numbers], seed: int) -> dict[str, MetricShift]:
    """Compare a slice with the same slice of the training, or the comparable metrics with all of the training."""
    if name in then.slices:
        return compare_metrics(then.select_rows(then.slices[name]), today, seed)
    return compare_metrics(comparable_metrics(then.values), today, seed)


def sample_both_sides(
    config: DriftConfig, setup: DriftSetup, training: Sequence[Prompt]
) -> tuple[MeasuredResponses, MeasuredResponses]:
    """Measure today's responses, and sample and measure responses to training prompts. Return today's first."""
    known = PromptWordPairs([prompt.content for prompt in training])
    sample = choose_prompts(training, max(ENOUGH, len(setup.policy.prompts)), config.seed, "training")
    then = sample_and_score_prompts(setup, sample, config.seed, "training")
    now = (
        score_logged_responses(setup, config.answers)
        if config.answers
        else sample_and_score_prompts(setup, setup.policy.prompts, config.seed, "today")
    )
    columns = [name for name in config.slices if any(name in prompt.columns for prompt in sample)]
    if missing := [name for name in config.slices if name not in columns]:
        setup.notes.append(
            f"the training prompts have no column {', '.join(missing)}: its slices are compared with all prompts"
        )
    values = metric_values(setup, now, known, of_training=False), metric_values(setup, then, known, of_training=True)
    if setup.reference is not None:
        for side in values:
            side["prompt_unlikely"] = mark_unlikely(side["prompt_logprob"], values[1]["prompt_logprob"])
    return (
        MeasuredResponses(now, values[0], slice_rows(now.prompts, config.slices)),
        MeasuredResponses(then, values[1], slice_rows(sample, columns)),
    )


def drift_verdict(metrics: Mapping[str, Any], training_slices: Mapping[str, Any]) -> dict[str, Any]:
    """Return the verdict on the reward models for all prompts and for each slice, with reasons for bad ones.

    A slice without training prompts is "in doubt" at best. Where the training prompts lack the column, the best verdict
    is "nothing new", since the slice was not compared with its kind.
    """
    slices: dict[str, str] = {}
    overall = model_verdict(metrics["figures"])
    because = {ALL: verdict_reasons(overall, metrics["figures"])}
    for name, compared in metrics["slices"].items():
        has_column = slice_column(name) in slice_columns(training_slices)
        is_new = has_column and name not in training_slices
        slices[name] = model_verdict(compared["figures"])
        if slices[name] == "applies" and not has_column:
            slices[name] = "nothing new"
        if is_new and slices[name] != "does not apply":
            slices[name] = "in doubt"
        reasons = ["none of the training prompts is of this kind"] * is_new
        because[name] = reasons + verdict_reasons(slices[name], compared["figures"])
    moved = [name for name, each in slices.items() if each in ALARMING]
    return {"reward_model": overall, "slices": slices, "moved_slices": moved, "because": because}


def verdict_reasons(verdict: str, metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the reasons for a verdict other than "applies" or "nothing new"."""
    if verdict == "too few to say":
        return explain_too_few(metrics)
    return describe_shifts(metrics) if verdict in ALARMING else []


def write_drift(
    output: str, metrics: Mapping[str, Any], today: MeasuredResponses, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Write metrics and responses to `output`, and rows for people to rank beside it."""
    if rows:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomic(ranking_file(output), lines)
    responses = [
        {
            "prompt": prompt.content,
            "response": texts[0],
            **{name: float(values[row]) for name, values in today.values.items()},
        }
        for row, (prompt, texts) in enumerate(zip(today.evaluated.prompts, today.evaluated.texts, strict=True))
    ]
    record = replace_non_finite({"figures": metrics, "answers": responses})
    write_atomic(Path(output), json.dumps(record, ensure_ascii=False, indent=1) + "\n")


def ranking_file(output: str) -> Path:
    return Path(output).with_suffix(".rank.jsonl")


def rows_to_rank(
    setup: DriftSetup, verdict: Mapping[str, Any], today: MeasuredResponses, config: DriftConfig
) -> list[dict[str, Any]]:
    """Return rows for `keel rank`: prompts of the slices that moved, each with up to RANKED distinct responses.

    Every process must call it, with the same verdict.

    Without moved slices, the rows are of all prompts if the verdict on all is bad, and otherwise empty.
    """
    chosen = {row for name in verdict["moved_slices"] for row in today.slices[name]}
    if not chosen and verdict["reward_model"] not in ALARMING:
        return []
    rows = sorted(chosen) or list(range(len(today.evaluated.prompts)))
    prompts = choose_prompts([today.evaluated.prompts[row] for row in rows], MOST_RANKED, config.seed, "rank")
    texts = sample_and_score_prompts(setup, prompts, config.seed, "rank", copies=RANKED).texts
    logged = [[str(prompt.columns["response"])] if config.answers else [] for prompt in prompts]
    lines = []
    for prompt, first, sampled in zip(prompts, logged, texts, strict=True):
        responses = list(dict.fromkeys([*first, *sampled]))[:RANKED]
        columns = {name: prompt.columns[name] for name in config.slices if name in prompt.columns}
        if len(responses) > 1:
            lines.append({"prompt": prompt.content, "responses": responses, **columns})
    return lines
