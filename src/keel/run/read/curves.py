"""The curves of a run, in groups and with their descriptions, as plain values for a page."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from keel.run.read.run import Run, Series

MOST = 600  # points of a curve
TREND = 120  # points of a trend; a curve with more than three times as many points has one

HELD_OUT = (
    "A scorer of weight 0: measured, not learned from. It should rise with the score. A fall means that the policy "
    "exploits the scorers that it learns from."
)
OTHER = "Other metrics"
NOT_CURVES = ("progress/",)  # running counts, which only grow


class MetricDescription(NamedTuple):
    """An entry of metric_descriptions.yaml: a metric, or a family of metrics with * in the name."""

    figure: str
    label: str
    means: str


@cache
def catalogue() -> dict[str, list[MetricDescription]]:
    """Return the title of each group -> its metrics, best known first."""
    text = files("keel.run.read").joinpath("metric_descriptions.yaml").read_text(encoding="utf-8")
    groups: dict[str, dict[str, list[str]]] = yaml.safe_load(text)
    return {
        title: [MetricDescription(metric, *texts) for metric, texts in entries.items()]
        for title, entries in groups.items()
    }


def metric_groups(run: Run) -> list[dict[str, Any]]:
    """Return the groups of curves of a run, best-known metrics first.

    [{"title", "curves": [{"figure", "label", "means", "steps", "values", "trend"}]}] of the metrics that the run has
    measured, without metrics that are equal to an earlier one. `values` has None for a gap. `trend` is {"steps",
    "values"}, the means over stretches of a long curve, or None.
    """
    return [
        {"title": title, "curves": [_curve(run, entry) for entry in entries]}
        for title, entries in _measured_metrics(run)
    ]


def labels(run: Run) -> dict[str, str]:
    """Return metric -> label of all metrics with a curve."""
    return {entry.figure: entry.label for _, entries in _measured_metrics(run) for entry in entries}


def thin_curve(steps: Any, values: Any, most: int = MOST) -> tuple[list[int], list[float | None]]:
    """Return the steps and values of at most `most` points of a curve.

    The first, the last, and the lowest and highest point of each stretch between them, so that spikes stay visible.
    Values have six digits; None is a gap without a finite value.
    """
    values = np.asarray(values, dtype=np.float64)
    indices = np.arange(len(values)) if len(values) <= most else _extremes(values, most)
    return [int(step) for step in np.asarray(steps)[indices]], [round_value(value) for value in values[indices]]


def trend(steps: Any, values: Any) -> dict[str, list[Any]] | None:
    """Return the means over stretches of equal length; None for a curve that is short enough to read without."""
    values, steps = np.asarray(values, dtype=np.float64), np.asarray(steps, dtype=np.float64)
    finite = np.isfinite(values)
    if finite.sum() <= 3 * TREND:
        return None
    starts = np.linspace(0, finite.sum(), TREND, endpoint=False).astype(int)
    counts = np.diff(starts, append=finite.sum())
    means = [np.add.reduceat(each[finite], starts) / counts for each in (steps, values)]
    return {name: [round_value(mean) for mean in each] for name, each in zip(("steps", "values"), means, strict=True)}


def round_value(value: float) -> float | None:
    """Round to six digits, more than a plot can show; None for nan and infinity."""
    return float(f"{value:.6g}") if np.isfinite(value) else None


def is_sparse(metric: str) -> bool:
    """Whether a metric is measured only at some steps by design, so that the steps between are no gap."""
    return metric.startswith("evaluate/") or "/eval_" in metric


def _measured_metrics(run: Run) -> Iterator[tuple[str, list[MetricDescription]]]:
    """Yield (title, entries) of the run's metrics in the order of the catalogue, unknown metrics last."""
    remaining = [name for name in run.columns if run.has(name) and not name.startswith(NOT_CURVES)]
    shown: list[Series] = []
    for title, entries in catalogue().items():
        group = []
        for entry in entries:
            for name in [name for name in remaining if fnmatchcase(name, entry.figure)]:
                remaining.remove(name)
                if not any(np.array_equal(run[name], other, equal_nan=True) for other in shown):
                    shown.append(run[name])
                    group.append(_describe_member(run, name, entry))
        if group:
            yield title, group
    if remaining:
        text = "A metric of this run that keel does not know."
        yield OTHER, [MetricDescription(name, name, text) for name in remaining]


def _describe_member(run: Run, metric: str, entry: MetricDescription) -> MetricDescription:
    """Return the entry of a family for one of its metrics."""
    prefix, _, suffix = entry.figure.partition("*")
    member = metric[len(prefix) : len(metric) - len(suffix)]
    if prefix in ("rewards/", "evaluate/rewards/") and member in run.held_out_scorers():
        return MetricDescription(metric, f"{entry.label.format(member)}, held out", HELD_OUT)
    return MetricDescription(metric, entry.label.format(member), entry.means)


def _curve(run: Run, entry: MetricDescription) -> dict[str, Any]:
    steps, values = run.steps, run[entry.figure]
    if is_sparse(entry.figure):
        measured = np.isfinite(values)
        steps, values = steps[measured], values[measured]
    kept, points = thin_curve(steps, values)
    return {**entry._asdict(), "steps": kept, "values": points, "trend": trend(steps, values)}


def _extremes(values: Series, most: int) -> NDArray[np.intp]:
    """Return the indices of the first and last value, and of the lowest and highest value of each stretch.

    A stretch without a finite value is represented by its first index, so that the gap stays visible.
    """
    width = -(-len(values) // (most // 2 - 1))
    stretches = np.pad(values, (0, -len(values) % width), constant_values=np.nan).reshape(-1, width)
    gaps = ~np.isfinite(stretches)
    within = [np.where(gaps, np.inf, stretches).argmin(1), np.where(gaps, -np.inf, stretches).argmax(1)]
    extremes = np.concatenate([offsets + width * np.arange(len(stretches)) for offsets in within])
    return np.unique([0, *extremes, len(values) - 1])
