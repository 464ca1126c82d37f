"""How many tokens a model's positions serve."""

from typing import Any

from keel.models.heads import plain


def rotation_threshold(model: Any) -> int | None:
    """Most tokens of a row that is read with LongRoPE's short factors (Ding et al. 2024); None without LongRoPE.

    One token more, and all positions of the row turn by other angles. A row's length is that of the longest row in its
    batch, as transformers reads it.
    """
    config = plain(model).config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    found = [kind.get("original_max_position_embeddings") for kind in kinds if kind.get("rope_type") == "longrope"]
    return min((int(tokens) for tokens in found if tokens), default=None)


def position_limit(model: Any) -> tuple[int | None, str]:
    """Most tokens of a prompt and a response together (None for no limit), and why, for the end of a sentence."""
    limit = getattr(plain(model).config.get_text_config(), "max_position_embeddings", None)
    threshold = rotation_threshold(model)
    if threshold is not None and (limit is None or threshold < limit):
        return threshold, f"the model reads all tokens anew (LongRoPE) beyond {threshold}"
    return limit, f"the model only {limit} positions"
