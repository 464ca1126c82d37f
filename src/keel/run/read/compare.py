"""Compare runs: different settings, score over KL, and differences of two texts."""

import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any, Literal

import numpy as np

from keel.run.read.curves import round_value
from keel.run.read.run import Run
from keel.run.read.series import trailing_mean, window

Change = Literal["same", "removed", "added"]
POINTS = 240
NO_MATTER = ("output",)  # differs between any two runs


def settings_differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return [{"name", "values"}] of the settings that differ, with one value per run; None where a run has none."""
    return differences([flat(run.settings) for run in runs])


def differences(mappings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return [{"name", "values"}] of the keys whose values differ between the mappings."""
    names = dict.fromkeys(name for mapping in mappings for name in mapping if name not in NO_MATTER)
    rows = [{"name": name, "values": [mapping.get(name) for mapping in mappings]} for name in names]
    return [row for row in rows if any(value != row["values"][0] for value in row["values"])]


def reward_kl_frontier(run: Run) -> dict[str, Any]:
    """Return the score of a policy at each distance from its start: {"figure", "steps", "kl", "score", "others"}.

    KL in nats per response; both are trailing means over a window (series.window). `others` are the scores that were
    not learned from: [{"figure", "label", "steps", "kl", "score"}] of held-out scorers, and of evaluations on held-out
    prompts, which are not smoothed. All lists are empty for a run without a reference.
    """
    held_out = [(f"rewards/{name}", name) for name in run.held_out_scorers()]
    others = [
        _points(run, "objective/kl", metric) | {"label": f"score by the held-out {name}"} for metric, name in held_out
    ]
    evaluated = [("evaluate/score", "score on held-out prompts")]
    evaluated += [
        (f"evaluate/{metric}", f"score by the held-out {name} on held-out prompts") for metric, name in held_out
    ]
    others += [_points(run, "evaluate/kl", metric, 1) | {"label": label} for metric, label in evaluated]
    measured = [points for points in others if points["steps"]]
    return _points(run, "objective/kl", "objective/scores") | {"others": measured}


def word_differences(first: str, second: str) -> list[tuple[Change, str]]:
    """Return the changes from the first text to the second, word by word: ("same" | "removed" | "added", text).

    Removed and same texts joined give `first`, up to white space; same and added texts give `second`. A single equal
    word or mark between two changes counts as changed: it is the same by chance.
    """
    old, new = _words(first), _words(second)
    matcher = SequenceMatcher(None, [word.strip() for word in old], [word.strip() for word in new])
    changes: list[tuple[Change, str]] = []
    removed, added = "", ""
    codes = matcher.get_opcodes()
    for index, (kind, i, i_end, j, j_end) in enumerate(codes):
        if kind == "equal" and (i_end - i > 1 or index in (0, len(codes) - 1)):
            changes += _changes(removed, added)
            changes.append(("same", "".join(new[j:j_end])))
            removed, added = "", ""
        else:
            removed, added = removed + "".join(old[i:i_end]), added + "".join(new[j:j_end])
    return changes + _changes(removed, added)


def flat(settings: Mapping[str, Any] | Sequence[Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted name -> value. The sections of a list are numbered: "rewards.0.weight"."""
    values: dict[str, Any] = {}
    for name, value in settings.items() if isinstance(settings, Mapping) else enumerate(settings):
        is_list_of_sections = isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value)
        if isinstance(value, Mapping) or is_list_of_sections:
            values |= flat(value, f"{prefix}{name}.")
        else:
            values[f"{prefix}{name}"] = value
    return values


def _points(run: Run, distance: str, metric: str, width: int | None = None) -> dict[str, Any]:
    """Return the steps at which both were measured: at most POINTS, evenly spaced, with the first and the last."""
    kl, score = run[distance], run[metric]
    both = np.isfinite(kl) & np.isfinite(score)
    width = width or window(run)
    kl, score = trailing_mean(kl[both], width), trailing_mean(score[both], width)
    kept = np.unique(np.linspace(0, len(kl) - 1, min(len(kl), POINTS)).round().astype(int))
    return {
        "figure": metric,
        "steps": run.steps[both][kept].tolist(),
        "kl": [round_value(value) for value in kl[kept]],
        "score": [round_value(value) for value in score[kept]],
    }


def _words(text: str) -> list[str]:
    """Split into words and marks, each with the white space before it; trailing white space is an item too."""
    return re.findall(r"\s*\w+|\s*[^\w\s]|\s+$", text)


def _changes(removed: str, added: str) -> list[tuple[Change, str]]:
    both: list[tuple[Change, str]] = [("removed", removed), ("added", added)]
    return [(kind, text) for kind, text in both if text]
