"""Where a reward model's scores lay on held-out answers of the kind that people judged. It travels with the model."""

import json
from collections.abc import Mapping
from pathlib import Path

from keel.errors import ConfigError

FILE = "range.json"
NAMES = ("score_lowest", "score_low", "score_median", "score_high", "score_highest", "score_std", "longest")


def write_range(folder: Path, figures: Mapping[str, float]) -> None:
    """Those of `figures` that are the range; nothing when nothing was held out."""
    found = {name: figures[name] for name in NAMES if name in figures}
    if found:
        (folder / FILE).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def read_range(model: str) -> dict[str, float] | None:
    """None for a model that came without. Raises ConfigError when it cannot be read."""
    path = Path(model) / FILE
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return {name: float(saved[name]) for name in NAMES}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError("the range of its scores cannot be read", str(path), "remove the file") from error
