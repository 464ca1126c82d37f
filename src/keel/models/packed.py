"""Hidden states of rows of unequal length, with no work on padding.

Models whose attention cannot be told so, or that compute anything else across tokens, are found by trial and read
padded rows.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from keel.models.attention import Layout
from keel.models.heads import plain, trunk
from keel.models.layers import is_known, rotations, walk

ATTENTION = "keel"
"""Name of this attention in a transformers config: sdpa, and packed rows where a layout is given."""


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
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layout.attend(query, key, value, scaling, sliding_window).unsqueeze(0), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def reads_packed(model: Any) -> bool:
    """Whether padding costs the model nothing."""
    return bool(plain(model).config.get_text_config()._attn_implementation == ATTENTION)


def token_states(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """Hidden states of the tokens under the mask, row by row. [B, L], [B, L] bool -> [mask.sum(), H]

    Padding may stand on any side.
    """
    if not reads_packed(model):
        tokens, mask = moved_left(tokens, mask)
        return trunk(model)(input_ids=tokens, attention_mask=mask.long(), use_cache=False).last_hidden_state[mask]
    lengths, order = mask.sum(1).sort(descending=True, stable=True)
    layout = Layout(lengths.tolist(), tokens.device)
    tokens, mask = tokens[order], mask[order]
    states = _packed_states(trunk(model), tokens[mask], (mask.cumsum(1) - 1)[mask], layout)
    return states.index_select(0, _back(lengths, order))


def _packed_states(trunk: Any, tokens: Tensor, positions: Tensor, layout: Layout) -> Tensor:
    """Tokens [N] and positions [N] in the order of the layout -> [N, H]"""
    if is_known(trunk):
        scaling, rotation = trunk.layers[0].self_attn.scaling, rotations(trunk, positions)
        return walk(trunk, tokens, lambda _, q, k, v: layout.attend(q, k, v, scaling, rotation=rotation))
    states: Tensor = trunk(
        input_ids=tokens.unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        attention_mask=tokens.new_ones(1, 1, 1, 1, dtype=torch.bool),  # of four dimensions, it is passed on as it is
        use_cache=False,
        layout=layout,
    ).last_hidden_state[0]
    return states


def _back(lengths: Tensor, order: Tensor) -> Tensor:
    """Where each token of the rows as they came lies in the packed order. -> [N]"""
    starts = (lengths.cumsum(0) - lengths)[order.argsort()]
    own = lengths[order.argsort()]
    first = own.cumsum(0) - own
    return torch.arange(int(own.sum()), device=own.device) + (starts - first).repeat_interleave(own)


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
    mask = torch.tensor([[False, True, True, True, False], [True] * 5], device=device)
    padded = token_states(model, tokens, mask)
    config._attn_implementation = ATTENTION
    try:
        agree = torch.allclose(token_states(model, tokens, mask), padded, rtol=1e-3, atol=_tolerance(padded))
    except (TypeError, ValueError, RuntimeError, KeyError):  # it knows no layout, or computes with one row's shape
        agree = False
    if not agree:
        config._attn_implementation = usual


def _tolerance(states: Tensor) -> float:
    return (0.1 if states.dtype.itemsize < 4 else 1e-4) * max(1.0, float(states.abs().max()))
