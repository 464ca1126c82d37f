"""Hidden states of rows of unequal length, with no work on padding.

The tokens of all rows lie one after the other, [1, N]; only attention unfolds them into rows. Models whose attention
cannot be told so, or that compute anything else across tokens, are found by trial and read padded rows instead.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from keel.models.heads import plain, trunk

ATTENTION = "keel"
"""Name of this attention in a transformers config: sdpa, and packed rows where a layout is given."""
SHORT = 128
"""Rows up to this length take plain products on a CPU."""


@dataclass(frozen=True)
class Layout:
    """Where each of N packed tokens stands when B rows of up to L tokens are unfolded."""

    place: Tensor  # [N], row * L + position
    rows: int  # B
    width: int  # L

    def unfold(self, x: Tensor) -> Tensor:
        """[1, heads, N, D] -> [B, heads, L, D]; what stands beyond the end of a row is zero."""
        flat = x[0].transpose(0, 1)
        if len(flat) < self.rows * self.width:
            flat = x.new_zeros(self.rows * self.width, *flat.shape[1:]).index_copy(0, self.place, flat)
        return flat.reshape(self.rows, self.width, *flat.shape[1:]).transpose(1, 2)

    def fold(self, x: Tensor) -> Tensor:
        """[B, heads, L, D] -> [1, N, heads, D]"""
        flat = x.transpose(1, 2).reshape(self.rows * self.width, x.shape[1], x.shape[3])
        return (flat if len(flat) == len(self.place) else flat.index_select(0, self.place)).unsqueeze(0)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    layout: Layout | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function for transformers. query [1, heads, N, D] -> [1, N, heads, D] when `layout` is given."""
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    query, key, value = (layout.unfold(x) for x in (query, key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = None if sliding_window is None or layout.width <= sliding_window else sliding_window
    if layout.width <= SHORT and query.device.type == "cpu":
        bias = _bias(layout.width, window, query.dtype)
        return layout.fold(_short_rows(query, key, value, bias, scaling)), None
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    near = None if window is None else _visible(layout.width, window, query.device)
    found = scaled_dot_product_attention(query, key, value, attn_mask=near, is_causal=near is None, scale=scaling)
    return layout.fold(found), None


def _short_rows(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """Attention as three plain operations, which for short rows on a CPU is up to twice as fast as the fused kernel.

    query [B, heads, L, D]; key, value [B, kv_heads, L, D], each read by heads / kv_heads queries in a row.
    """
    rows, heads, width, size = query.shape
    groups = heads // key.shape[1]
    queries, keys, values = (x.reshape(rows * key.shape[1], -1, size) for x in (query, key, value))
    bias = bias.repeat(groups, 1).expand(len(queries), -1, -1)
    weights = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=scaling).softmax(-1)
    return (weights @ values).view(rows, heads, width, size)


def _visible(width: int, window: int | None, device: torch.device) -> Tensor:
    """True where a token looks: back to itself and the `window` - 1 tokens before it, or to all. [L, L] bool"""
    position = torch.arange(width, device=device)
    distance = position.unsqueeze(1) - position
    return (distance >= 0) & (distance < (window or width))


@lru_cache(maxsize=512)
def _bias(width: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """0 where a token looks and -inf elsewhere. [L, L]"""
    visible = _visible(width, window, torch.device("cpu"))
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, -torch.inf)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def token_states(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """Hidden states of the tokens under the mask, row by row. [B, L], [B, L] bool -> [mask.sum(), H]

    Padding may stand on any side.
    """
    if plain(model).config.get_text_config()._attn_implementation != ATTENTION:
        tokens, mask = moved_left(tokens, mask)
        return trunk(model)(input_ids=tokens, attention_mask=mask.long(), use_cache=False).last_hidden_state[mask]
    positions = (mask.cumsum(1) - 1)[mask]
    rows, width = mask.shape[0], int(mask.sum(1).max())
    row = torch.arange(rows, device=mask.device).unsqueeze(1).expand_as(mask)[mask]
    output = trunk(model)(
        input_ids=tokens[mask].unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        attention_mask=mask.new_ones(1, 1, 1, 1),  # a mask in four dimensions is passed on as it is
        use_cache=False,
        layout=Layout(row * width + positions, rows, width),
    )
    return output.last_hidden_state[0]


def moved_left(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same rows without padding before or inside them: each has the positions it has alone. [B, L] -> [B, <= L]"""
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(mask.sum(1).max())]
    return tokens.gather(1, order), mask.gather(1, order)


@torch.no_grad()
def pack_if_possible(model: Any) -> None:
    """Let a decoder read packed rows if that gives the states of padded rows, which is tried."""
    config = plain(model).config.get_text_config()
    usual = config._attn_implementation
    device = plain(model).device
    tokens = torch.arange(10, device=device).view(2, 5) % config.vocab_size
    mask = torch.tensor([[True] * 5, [False, True, True, True, False]], device=device)
    padded = token_states(model, tokens, mask)
    config._attn_implementation = ATTENTION
    try:
        agree = torch.allclose(token_states(model, tokens, mask), padded, rtol=1e-3, atol=_tolerance(padded))
    except (TypeError, ValueError, RuntimeError, KeyError):  # it knows no layout, or computes with one row's shape
        agree = False
    if not agree:
        config._attn_implementation = usual


def _tolerance(states: Tensor) -> float:
    return 0.1 * float(states.abs().max()) if states.dtype.itemsize < 4 else 1e-4 * max(1.0, float(states.abs().max()))
