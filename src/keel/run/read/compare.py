"""Runs beside runs: other settings, the score against how far the policy went, and what changed in an answer."""

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
NO_MATTER = ("output",)  # every run has its own


def settings_differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """[{"name", "values"}] for each setting that the runs do not share, one value a run; None where a run has none."""
    return differences([flat(run.settings) for run in runs])


def differences(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same of any flat mappings."""
    names = dict.fromkeys(name for values in found for name in values if name not in NO_MATTER)
    rows = [{"name": name, "values": [values.get(name) for values in found]} for name in names]
    return [row for row in rows if any(value != row["values"][0] for value in row["values"])]


def reward_kl_frontier(run: Run) -> dict[str, Any]:
    """What a policy is worth at each distance from its start: {"steps", "kl", "score", "others"}.

    KL in nats per answer, means over the last tenth of a run's steps so far (series.window). `others` are what was not
    learned from: [{"figure", "label", "steps", "kl", "score"}], scorers of weight 0 and, as measured, those of
    held-out prompts. All empty for a run without a reference.
    """
    held_out = [(f"rewards/{name}", name) for name in run.held_out_scorers()]
    own = [
        _points(run, "objective/kl", metric) | {"label": f"score by the held-out {name}"} for metric, name in held_out
    ]
    evaluated = [("evaluate/score", "score on held-out prompts")]
    evaluated += [
        (f"evaluate/{metric}", f"score by the held-out {name} on held-out prompts") for metric, name in held_out
    ]
    own += [_points(run, "evaluate/kl", metric, 1) | {"label": label} for metric, label in evaluated]
    return _points(run, "objective/kl", "objective/scores") | {"others": [points for points in own if points["steps"]]}


def word_differences(before: str, after: str) -> list[tuple[Change, str]]:
    """How the first text becomes the second, word by word: ("same" | "removed" | "added", text).

    Removed and same texts joined give `before`, up to white space; same and added ones give `after`. A single word or
    mark that is the same between two changes belongs to them: it is chance.
    """
    old, new = _words(before), _words(after)
    matcher = SequenceMatcher(None, [word.strip() for word in old], [word.strip() for word in new])
    found: list[tuple[Change, str]] = []
    removed, added = "", ""
    codes = matcher.get_opcodes()
    for place, (kind, i, i_end, j, j_end) in enumerate(codes):
        if kind == "equal" and (i_end - i > 1 or place in (0, len(codes) - 1)):
            found += _changes(removed, added)
            found.append(("same", "".join(new[j:j_end])))
            removed, added = "", ""
        else:
            removed, added = removed + "".join(old[i:i_end]), added + "".join(new[j:j_end])
    return found + _changes(removed, added)


def flat(settings: Mapping[str, Any] | Sequence[Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value; the parts of a list of sections have numbers."""
    found: dict[str, Any] = {}
    for name, value in settings.items() if isinstance(settings, Mapping) else enumerate(settings):
        sections = isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value)
        found |= (
            flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) or sections else {f"{prefix}{name}": value}
        )
    return found


def _points(run: Run, distance: str, metric: str, width: int | None = None) -> dict[str, Any]:
    """Where both were measured, at most POINTS of them, first and last among them."""
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
    """Words and marks, each with the white space before it; what stands after the last is one of its own."""
    return re.findall(r"\s*\w+|\s*[^\w\s]|\s+$", text)


def _changes(removed: str, added: str) -> list[tuple[Change, str]]:
    both: list[tuple[Change, str]] = [("removed", removed), ("added", added)]
    return [(kind, text) for kind, text in both if text]
