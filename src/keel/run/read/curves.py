"""The curves of a run, by group, each with what it means: plain values for a page."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from keel.run.read.run import Run, Series

MOST = 600
TREND = 120
"""Points of a trend: a curve of more than three times as many has one."""

HELD_OUT = (
    "A scorer of weight 0: measured, not learned from. It should rise with the score; when it turns, the policy "
    "exploits what only the paid scorers like."
)
OTHER = "Other figures"
NOT_CURVES = ("progress/",)  # counts of what was done


class MetricDescription(NamedTuple):
    """A metric, or a family of metrics, as metric_descriptions.yaml describes it."""

    figure: str
    label: str
    means: str


@cache
def catalogue() -> dict[str, list[MetricDescription]]:
    """Title of a group -> its figures, best known first."""
    text = files("keel.run.read").joinpath("metric_descriptions.yaml").read_text(encoding="utf-8")
    groups: dict[str, dict[str, list[str]]] = yaml.safe_load(text)
    return {
        title: [MetricDescription(metric, *words) for metric, words in known.items()] for title, known in groups.items()
    }


def metric_groups(run: Run) -> list[dict[str, Any]]:
    """[{"title", "curves": [{"figure", "label", "means", "steps", "values", "trend"}]}], best-known figures first.

    Only what the run has measured, and no figure that repeats an earlier one number for number. `values` has None for a
    gap; `trend` is the means of a long curve over stretches of it, as {"steps", "values"}, else None.
    """
    return [{"title": title, "curves": [_curve(run, known) for known in metrics]} for title, metrics in _known(run)]


def labels(run: Run) -> dict[str, str]:
    """Figure -> label, of all that have a curve."""
    return {known.figure: known.label for _, metrics in _known(run) for known in metrics}


def thin_curve(steps: Any, values: Any, most: int = MOST) -> tuple[list[int], list[float | None]]:
    """At most so many points of a curve of N: first, last, and the lowest and highest of each stretch between them.

    Values are rounded to six digits; None is a gap, where nothing or nothing finite was measured.
    """
    values = np.asarray(values, dtype=np.float64)
    places = np.arange(len(values)) if len(values) <= most else _extremes(values, most)
    return [int(step) for step in np.asarray(steps)[places]], [round_value(value) for value in values[places]]


def trend(steps: Any, values: Any) -> dict[str, list[Any]] | None:
    """Means over stretches of equal length; None for a curve that is short enough to be read as it is."""
    values, steps = np.asarray(values, dtype=np.float64), np.asarray(steps, dtype=np.float64)
    finite = np.isfinite(values)
    if finite.sum() <= 3 * TREND:
        return None
    starts = np.linspace(0, finite.sum(), TREND, endpoint=False).astype(int)
    counts = np.diff(starts, append=finite.sum())
    means = [np.add.reduceat(each[finite], starts) / counts for each in (steps, values)]
    return {name: [round_value(mean) for mean in each] for name, each in zip(("steps", "values"), means, strict=True)}


def round_value(value: float) -> float | None:
    """Six digits, which is more than a page can show; None for what is no number."""
    return float(f"{value:.6g}") if np.isfinite(value) else None


def is_sparse(metric: str) -> bool:
    """Measured in some steps only, by design: what lies between is no gap."""
    return metric.startswith("evaluate/") or "/eval_" in metric


def _known(run: Run) -> Iterator[tuple[str, list[MetricDescription]]]:
    """The figures of the run in the order of the catalogue, then those that it does not name."""
    left = [name for name in run.columns if run.has(name) and not name.startswith(NOT_CURVES)]
    seen: list[Series] = []
    for title, entries in catalogue().items():
        here = []
        for entry in entries:
            for name in [name for name in left if fnmatchcase(name, entry.figure)]:
                left.remove(name)
                if not any(np.array_equal(run[name], other, equal_nan=True) for other in seen):
                    seen.append(run[name])
                    here.append(_named(run, name, entry))
        if here:
            yield title, here
    if left:
        yield OTHER, [MetricDescription(name, name, "A figure of this run that keel does not know.") for name in left]


def _named(run: Run, metric: str, entry: MetricDescription) -> MetricDescription:
    """The entry of a family with the name of the one that is meant."""
    before, _, after = entry.figure.partition("*")
    own = metric[len(before) : len(metric) - len(after)]
    if before in ("rewards/", "evaluate/rewards/") and own in run.held_out_scorers():
        return MetricDescription(metric, f"{entry.label.format(own)}, held out", HELD_OUT)
    return MetricDescription(metric, entry.label.format(own), entry.means)


def _curve(run: Run, known: MetricDescription) -> dict[str, Any]:
    steps, values = run.steps, run[known.figure]
    if is_sparse(known.figure):
        measured = np.isfinite(values)
        steps, values = steps[measured], values[measured]
    kept, points = thin_curve(steps, values)
    return {**known._asdict(), "steps": kept, "values": points, "trend": trend(steps, values)}


def _extremes(values: Series, most: int) -> NDArray[np.intp]:
    """Places of the first and the last, and of the lowest and the highest of each stretch; where nothing was measured
    in one, its first place."""
    width = -(-len(values) // (most // 2 - 1))
    stretches = np.pad(values, (0, -len(values) % width), constant_values=np.nan).reshape(-1, width)
    gaps = ~np.isfinite(stretches)
    within = [np.where(gaps, np.inf, stretches).argmin(1), np.where(gaps, -np.inf, stretches).argmax(1)]
    found = np.concatenate([own + width * np.arange(len(stretches)) for own in within])
    return np.unique([0, *found, len(values) - 1])
