"""One token more for every row: the models' forward passes while answers are sampled.

`LayerDecoder` walks through the layers of Llama-like models itself, over a cache allocated once, in a fraction of the
small operations that the modules of transformers take. `ModuleDecoder` does it for any other causal model.
Both give the hidden state [n, H] of the last token of each row, which the output matrix turns into logits.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from transformers import DynamicCache

from keel.models.heads import plain, positions_for, trunk

LAYERS_KNOWN = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
"""Trunks made of: RMS norm, rotary attention, RMS norm, gated linear unit. Their variants differ in nothing else."""


class Decoder(Protocol):
    """Rows that grow token by token."""

    def start(self, tokens: Tensor, mask: Tensor, copies: int) -> Tensor:
        """Read U prompts [U, P], padded on the left, for `copies` rows each. -> [U * copies, H]"""
        ...

    def advance(self, tokens: Tensor) -> Tensor:
        """Append a token to each row. [n] -> [n, H]"""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order. [m]"""
        ...


def decoder_for(model: Any, max_response_tokens: int) -> Decoder:
    """The fastest decoder that knows the model."""
    config = plain(model).config.get_text_config()
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    known = type(trunk(model)).__name__ in LAYERS_KNOWN and rope in ("default", "linear", "llama3", "yarn")
    if known and getattr(config, "sliding_window", None) is None:
        return LayerDecoder(trunk(model), max_response_tokens)
    return ModuleDecoder(model)


class LayerDecoder:
    """Decodes through the layers' own weights (adapters included); B rows, T columns, `n` of the rows still going."""

    def __init__(self, trunk: Any, max_response_tokens: int) -> None:
        self.trunk, self.max_response_tokens = trunk, max_response_tokens
        attention = trunk.layers[0].self_attn
        self.head_size, self.scaling = attention.head_dim, attention.scaling
        self.groups = attention.num_key_value_groups

    def start(self, tokens: Tensor, mask: Tensor, copies: int) -> Tensor:
        config = self.trunk.config
        count, self.column = tokens.shape
        columns = self.column + self.max_response_tokens
        heads = config.num_key_value_heads
        weight = self.trunk.embed_tokens.weight
        shape = (len(self.trunk.layers), 2, count * copies, heads, columns, self.head_size)
        self.cache = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        cos, sin = self.trunk.rotary_emb(weight, torch.arange(columns, device=weight.device).unsqueeze(0))
        self.cos, self.sin = cos[0], sin[0]  # [columns, head_size]
        causal = mask.unsqueeze(1) & torch.ones_like(mask[0]).expand(self.column, -1).tril()
        # A padded place looks at itself, so that no row of the softmax is empty; nothing looks at it.
        causal |= torch.eye(self.column, dtype=torch.bool, device=mask.device)
        states = self._through_layers(tokens, positions, causal.unsqueeze(1), slice(0, self.column), copies)
        self.next_position = (positions[:, -1] + 1).repeat_interleave(copies)
        self.visible = None
        if not bool(mask.all()):
            self.visible = mask.new_ones(count * copies, 1, 1, columns)
            self.visible[:, 0, 0, : self.column] = mask.repeat_interleave(copies, 0)
        return states[:, -1].repeat_interleave(copies, 0)

    def advance(self, tokens: Tensor) -> Tensor:
        here = slice(self.column, self.column + 1)
        self.column += 1
        n = len(tokens)
        visible = None if self.visible is None else self.visible[:n, ..., : self.column]
        states = self._through_layers(tokens.unsqueeze(1), self.next_position.unsqueeze(1), visible, here)
        self.next_position = self.next_position + 1
        return states[:, 0]

    def keep(self, rows: Tensor) -> None:
        """Only rows whose place changes are copied, in all layers at once."""
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero().squeeze(1)
        if len(moved):
            columns = self.column
            self.cache[:, :, moved, :, :columns] = self.cache[:, :, rows[moved], :, :columns]
            if self.visible is not None:
                self.visible[moved] = self.visible[rows[moved]]
        self.next_position = self.next_position[rows]

    def _through_layers(
        self, tokens: Tensor, positions: Tensor, visible: Tensor | None, columns: slice, copies: int = 1
    ) -> Tensor:
        """Hidden states of new tokens [n, q] at `columns`; their keys and values enter the cache. -> [n, q, H]"""
        cos, sin = self.cos[positions].unsqueeze(2), self.sin[positions].unsqueeze(2)
        hidden = self.trunk.embed_tokens(tokens)
        for index, layer in enumerate(self.trunk.layers):
            normed = _norm(layer.input_layernorm, hidden)
            hidden = hidden + self._attend(
                layer.self_attn, normed, cos, sin, visible, self.cache[index], columns, copies
            )
            normed, mlp = _norm(layer.post_attention_layernorm, hidden), layer.mlp
            hidden = hidden + mlp.down_proj(mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed))
        return _norm(self.trunk.norm, hidden)

    def _attend(
        self,
        attention: Any,
        normed: Tensor,
        cos: Tensor,
        sin: Tensor,
        visible: Tensor | None,
        cache: Tensor,
        columns: slice,
        copies: int,
    ) -> Tensor:
        """Attention of new tokens [n, q, H] to the rows so far; `cache` [2, B, heads, T, D] is this layer's."""
        n, q, _ = normed.shape
        query, key, value = (
            project(normed).view(n, q, -1, self.head_size)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):
            query, key = _norm(attention.q_norm, query), _norm(attention.k_norm, key)
        query, key = (_rotated(x, cos, sin).transpose(1, 2) for x in (query, key))
        cache[0, : n * copies, :, columns] = key.repeat_interleave(copies, 0)
        cache[1, : n * copies, :, columns] = value.transpose(1, 2).repeat_interleave(copies, 0)
        if q == 1:  # the queries of a group stand side by side, so that keys and values need no copies for them
            keys, values = cache[:, :n, :, : columns.stop]
            grouped = query.reshape(n, -1, self.groups, self.head_size)
            found = scaled_dot_product_attention(grouped, keys, values, attn_mask=visible, scale=self.scaling)
            return attention.o_proj(found.reshape(n, 1, -1))
        key, value = (x.repeat_interleave(self.groups, 1) for x in (key, value.transpose(1, 2)))
        found = scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=self.scaling)
        return attention.o_proj(found.transpose(1, 2).reshape(n, q, -1))


def _norm(module: Any, x: Tensor) -> Tensor:
    return rms_norm(x, (x.shape[-1],), module.weight, module.variance_epsilon)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021). x [n, q, heads, D], cos and sin [n, q, 1, D]"""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class ModuleDecoder:
    """Decodes by the model's own forward pass and cache."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def start(self, tokens: Tensor, mask: Tensor, copies: int) -> Tensor:
        self.cache = DynamicCache(config=plain(self.model).config)
        self.mask = mask.long()
        states = self._forward(tokens, positions_for(self.model, self.mask))
        if copies > 1:
            self.cache.batch_repeat_interleave(copies)
            self.mask = self.mask.repeat_interleave(copies, 0)
        return states.repeat_interleave(copies, 0)

    def advance(self, tokens: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        positions = {name: every[:, -1:] for name, every in positions_for(self.model, self.mask).items()}
        return self._forward(tokens.unsqueeze(1), positions)

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]

    def _forward(self, tokens: Tensor, positions: dict[str, Tensor]) -> Tensor:
        output = trunk(self.model)(
            input_ids=tokens, attention_mask=self.mask, past_key_values=self.cache, use_cache=True, **positions
        )
        return output.last_hidden_state[:, -1]
