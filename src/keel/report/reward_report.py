"""The report of a reward model: one HTML file without scripts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from keel.files import read_regular
from keel.report.reward_checks import HeldOutRankings, accuracy_groups, length_correlation, mistakes, similar_lengths
from keel.run.folder import RunFolder, write_atomic
from keel.stats import preference_metrics


def write_reward_report(run: str) -> Path | None:
    """Write `report.html` to the run folder of `keel reward`, if there are held-out rankings.

    Returns:
        The path of the page, or None without held-out rankings.

    Raises:
        DataError: The held-out scores cannot be read.
    """
    folder = RunFolder(run)
    metrics = json.loads(read_regular(folder.path / "figures.json"))
    held_out = HeldOutRankings.read(folder.path)
    if not held_out.rankings:
        return None
    gate = folder.model / "gate.json"
    page = template_environment().get_template("reward.html")
    text = page.render(
        name=folder.path.name,
        metrics=metrics,
        gate=json.loads(read_regular(gate)) if gate.is_file() else None,
        settings=folder.settings(),
        uncalibrated_error=metrics.get("uncalibrated_error", metrics["calibration_error"]),
        calibrated="uncalibrated_error" in metrics,
        **reward_sections(held_out, metrics["temperature"] if "uncalibrated_error" in metrics else 1.0),
    )
    target = folder.path / "report.html"
    write_atomic(target, text)
    return target


def reward_sections(held_out: HeldOutRankings, divided_by: float) -> dict[str, Any]:
    """Compute the template values of the page beside the logged metrics.

    Args:
        held_out: The held-out rankings and the saved scores.
        divided_by: The temperature by which the saved scores are divided; 1 if they are not.
    """
    pairs = held_out.pairs
    learned = pairs.scale(divided_by)
    similar = similar_lengths(held_out, pairs)
    correlation = length_correlation(held_out)
    return {
        "num_pairs": len(pairs.differences),
        "num_rankings": len(held_out.rankings),
        "groups": accuracy_groups(held_out),
        "reliability": preference_metrics.reliability(learned),
        "reliability_after": preference_metrics.reliability(
            preference_metrics.calibrate_pairs(learned, held_out.rankings)
        ),
        "length_correlation": None if np.isnan(correlation) else correlation,
        "matched_accuracy": preference_metrics.accuracy(pairs.where(similar)) if similar.any() else None,
        "num_matched": int(similar.sum()),
        "mistakes": mistakes(held_out),
    }


def template_environment() -> Environment:
    """Create the environment of the report templates. Text by models and raters is escaped."""
    return Environment(
        loader=PackageLoader("keel.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
