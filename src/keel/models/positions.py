"""How many tokens a model's positions serve."""

from typing import Any

from keel.errors import ConfigError
from keel.models.heads import plain, trunk


def num_positions(model: Any) -> int | None:
    """Most tokens that a model has positions for; None for one that needs none (XLNet's config says -1).

    RoBERTa and its kin number the tokens from `padding_idx` + 1 on.
    """
    total = getattr(plain(model).config.get_text_config(), "max_position_embeddings", None) or 0
    table = getattr(getattr(trunk(model), "embeddings", None), "position_embeddings", None)
    offset = getattr(table, "padding_idx", None)
    return None if total <= 0 else total if offset is None else total - offset - 1


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


def require_positions(model: Any, prompt_tokens: int, response_tokens: int, where: str, section: str) -> None:
    """Raise ConfigError if a prompt and a response of so many tokens are more than the model reads one way.

    Args:
        section: of the setting `max_response_tokens`.
    """
    needed = prompt_tokens + response_tokens
    limit, threshold = num_positions(model), rotation_threshold(model)
    fix = f"lower prompts.max_tokens or {section}.max_response_tokens"
    if limit is not None and needed > limit:
        what = f"the model only {limit} positions"
        raise ConfigError(f"longest prompt and answer have {needed} tokens, {what}", where=where, fix=fix)
    if threshold is not None and needed > threshold:
        what = f"and with more than {threshold} the model (LongRoPE) reads the tokens before anew"
        raise ConfigError(f"longest prompt and answer have {needed} tokens, {what}", where=where, fix=fix)
