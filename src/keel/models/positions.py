"""Limits of a model's positions on the length of a text."""

from typing import Any

from keel.errors import ConfigError
from keel.models.heads import trunk, unwrap_model


def num_positions(model: Any) -> int | None:
    """Return the number of positions of a model; None if it needs none (XLNet's config has -1).

    RoBERTa and related models number the tokens from `padding_idx` + 1.
    """
    total = getattr(unwrap_model(model).config.get_text_config(), "max_position_embeddings", None) or 0
    table = getattr(getattr(trunk(model), "embeddings", None), "position_embeddings", None)
    offset = getattr(table, "padding_idx", None)
    return None if total <= 0 else total if offset is None else total - offset - 1


def rotation_threshold(model: Any) -> int | None:
    """Return the largest row length with LongRoPE's short factors (Ding et al. 2024); None without LongRoPE.

    In a longer row, all positions have other rotation angles. transformers takes the longest row of a batch as the
    length of all its rows.
    """
    config = unwrap_model(model).config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    limits = [kind.get("original_max_position_embeddings") for kind in kinds if kind.get("rope_type") == "longrope"]
    return min((int(tokens) for tokens in limits if tokens), default=None)


def require_positions(model: Any, prompt_tokens: int, response_tokens: int, where: str, section: str) -> None:
    """Raise ConfigError if a prompt and a response of these lengths are too long for the model.

    The limits are the model's positions and LongRoPE's threshold.

    Args:
        section: section of the setting `max_response_tokens`.
    """
    needed = prompt_tokens + response_tokens
    limit, threshold = num_positions(model), rotation_threshold(model)
    fix = f"lower prompts.max_tokens or {section}.max_response_tokens"
    if limit is not None and needed > limit:
        what = f"but the model has only {limit} positions"
        raise ConfigError(f"the longest prompt and response have {needed} tokens, {what}", where=where, fix=fix)
    if threshold is not None and needed > threshold:
        # Its first tokens would then have other probabilities than those that they were sampled with.
        what = f"but the model (LongRoPE) changes all rotation angles above {threshold} tokens"
        raise ConfigError(f"the longest prompt and response have {needed} tokens, {what}", where=where, fix=fix)
