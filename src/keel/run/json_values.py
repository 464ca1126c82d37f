"""Make values valid in JSON."""

import math
from collections.abc import Mapping
from typing import Any


def replace_non_finite(value: Any) -> Any:
    """Replace numbers that are not finite by None, in lists and mappings too. JSON has no NaN and no infinity."""
    if isinstance(value, list | tuple):
        return [replace_non_finite(item) for item in value]
    if isinstance(value, Mapping):
        return {key: replace_non_finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
