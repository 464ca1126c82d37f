"""The report page of a reward model: one file without scripts, which opens anywhere."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from keel.files import read_regular
from keel.report.reward_checks import HeldOut, accuracy_groups, length_correlation, mistakes, similar_lengths
from keel.run.folder import RunFolder, write_atomic
from keel.stats import preference_metrics as judging


def write_reward_report(run: str) -> Path | None:
    """`report.html` in the run folder of `keel reward`; None without held-out prompts. Raises DataError."""
    folder = RunFolder(run)
    metrics = json.loads(read_regular(folder.path / "figures.json"))
    held_out = HeldOut.read(folder.path)
    if not held_out.rankings:
        return None
    verdict = folder.model / "gate.json"
    page = environment().get_template("reward.html")
    text = page.render(
        name=folder.path.name,
        figures=metrics,
        gate=json.loads(read_regular(verdict)) if verdict.is_file() else None,
        settings=folder.settings(),
        before=metrics.get("uncalibrated_error", metrics["calibration_error"]),
        calibrated="uncalibrated_error" in metrics,
        **reward_sections(held_out, metrics["temperature"] if "uncalibrated_error" in metrics else 1.0),
    )
    target = folder.path / "report.html"
    write_atomic(target, text)
    return target


def reward_sections(held_out: HeldOut, divided_by: float) -> dict[str, Any]:
    """All that the page shows beside the figures; the scores have been divided by this temperature."""
    pairs = held_out.pairs
    learned = pairs.scale(divided_by)
    near = similar_lengths(held_out, pairs)
    correlation = length_correlation(held_out)
    return {
        "num_pairs": len(pairs.differences),
        "num_rankings": len(held_out.rankings),
        "groups": accuracy_groups(held_out),
        "reliability": judging.reliability(learned),
        "reliability_after": judging.reliability(judging.calibrate_pairs(learned, held_out.rankings)),
        "length_correlation": None if np.isnan(correlation) else correlation,
        "matched_accuracy": judging.accuracy(pairs.where(near)) if near.any() else None,
        "num_matched": int(near.sum()),
        "mistakes": mistakes(held_out),
    }


def environment() -> Environment:
    """Whatever a model or a rater wrote is shown literally."""
    return Environment(
        loader=PackageLoader("keel.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
