"""Texts of findings: how a metric changed, and its current value."""

import numpy as np

from keel.diagnosis.findings import Evidence
from keel.run.read.run import Run
from keel.run.read.series import last, trailing_mean, window


def change_evidence(run: Run, metric: str, note: str = "") -> Evidence:
    """Report the means of a metric over the first and the last window."""
    width = window(run)
    means = [
        format_evidence(last(trailing_mean(values, width))) for values in (run[metric][:width], run[metric][-width:])
    ]
    text = f"{means[0]} in the first {width} steps, {means[1]} in the last"
    return Evidence(metric, text + (f"; {note}" if note else ""))


def current_evidence(run: Run, metric: str, note: str = "") -> Evidence:
    """Report the mean of a metric over the last window."""
    value = format_evidence(last(trailing_mean(run[metric][-window(run) :], window(run))))
    return Evidence(metric, value + (f"; {note}" if note else ""))


def format_evidence(value: float) -> str:
    """Format a number with three digits."""
    return f"{value:.3g}" if np.isfinite(value) else "not measured"


def applicable_texts(*pairs: tuple[bool, str]) -> tuple[str, ...]:
    """Return the texts whose condition is true."""
    return tuple(text for applies, text in pairs if applies)


def ratio(numerator: float, denominator: float) -> float:
    """Divide; return infinity for a denominator of 0."""
    return numerator / denominator if denominator else float("inf")
