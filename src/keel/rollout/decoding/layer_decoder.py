"""Decoding through the layers of Llama-like models with torch's operations, on any device."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from keel.data.padding import next_multiple
from keel.models.layers import lightweight_layers, rotate, rotations, run_layers


class LayerDecoder:
    """Decodes through the layers, over a cache [layers, 2, B, kv_heads, T, D] of keys and values.

    B rows at the start, T columns of prompt and response, D numbers per head.
    """

    def __init__(self, trunk: Any, max_response_tokens: int) -> None:
        self.trunk, self.max_response_tokens = lightweight_layers(trunk), max_response_tokens
        attention = trunk.layers[0].self_attn
        self.size, self.scaling, self.groups = attention.head_dim, attention.scaling, attention.num_key_value_groups

    def start(self, tokens: Tensor, mask: Tensor, copies: int) -> Tensor:
        count, self.column = tokens.shape
        columns = self.column + self.max_response_tokens
        weight, config = self.trunk.embed_tokens.weight, self.trunk.config
        shape = (len(self.trunk.layers), 2, count * copies, config.num_key_value_heads, columns, self.size)
        self.cache = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.cos, self.sin = rotations(self.trunk, torch.arange(columns, device=weight.device))
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        # A padded position attends to itself, so that no row of the softmax is empty. No token attends to it.
        itself = torch.eye(self.column, dtype=torch.bool, device=mask.device)
        visible = ((mask.unsqueeze(1) & torch.ones_like(itself).tril()) | itself).unsqueeze(1)

        rotation = self.cos[positions], self.sin[positions]

        def read(index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key = (rotate(x, *rotation) for x in (query, key))
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            self.cache[index, 0, :, :, : self.column] = key.repeat_interleave(copies, 0)
            self.cache[index, 1, :, :, : self.column] = value.repeat_interleave(copies, 0)
            key, value = (x.repeat_interleave(self.groups, 1) for x in (key, value))
            attended = scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=self.scaling)
            return attended.transpose(1, 2)

        states = run_layers(self.trunk, tokens, read)
        self.positions = (positions[:, -1] + 1).repeat_interleave(copies)
        self.bias = None
        if not bool(mask.all()):  # added to the attention scores, the lowest number hides padding
            self.bias = weight.new_zeros(count * copies, 1, 1, columns)
            padded = ~mask.repeat_interleave(copies, 0)
            self.bias[:, 0, 0, : self.column].masked_fill_(padded, torch.finfo(weight.dtype).min)
        return states[:, -1].repeat_interleave(copies, 0)

    def advance(self, tokens: Tensor) -> Tensor:
        n, here = len(tokens), self.column
        self.column += 1
        bias = None if self.bias is None else self.bias[:n, ..., : self.column]

        rotation = self.cos[self.positions[:n]], self.sin[self.positions[:n]]

        def attend(index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key = (rotate(x, *rotation) for x in (query, key))
            cache = self.cache[index]
            cache[0, :n, :, here], cache[1, :n, :, here] = key, value
            return self._attend(query, cache[:, :n, :, : self.column], bias)

        states = run_layers(self.trunk, tokens, attend)
        self.positions += 1
        return states

    def _attend(self, query: Tensor, cache: Tensor, bias: Tensor | None) -> Tensor:
        """Attend to the keys and values [2, n, kv_heads, t, D] of a cache. query [n, heads, D] -> [n, heads, D]"""
        # The queries that share a key are in one dimension, so that the cache is not copied for each of them.
        grouped = query.unflatten(1, (-1, self.groups))
        return _one_query(grouped, cache[0], cache[1], bias, self.scaling).flatten(1, 2)

    def keep(self, rows: Tensor) -> None:
        # Only rows that move are copied, in all layers at once.
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero().squeeze(1)
        if len(moved):
            cache = self.cache[..., : self.column, :]
            cache[:, :, moved] = cache[:, :, rows[moved]]
            self.positions[moved] = self.positions[rows[moved]]
            if self.bias is not None:
                self.bias[moved] = self.bias[rows[moved]]


def _one_query(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """Compute the attention of the newest tokens. -> [n, kv_heads, groups, D]

    query [n, kv_heads, groups, D], keys and values [n, kv_heads, t, D], bias [n, 1, 1, t]
    """
    if query.device.type != "cpu":  # on a CPU, two plain products take half the time of the fused kernel
        return scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=scaling)
    weights = torch.bmm((query * scaling).flatten(0, 1), keys.flatten(0, 1).transpose(1, 2)).view(*query.shape[:3], -1)
    weights = weights if bias is None else weights.add_(bias)
    return torch.bmm(weights.softmax(-1).flatten(0, 1), values.flatten(0, 1)).view(query.shape)


class GraphDecoder(LayerDecoder):
    """Decodes through the layers with CUDA graphs, one per size of a step.

    On a GPU, the launches of a step take longer than its work. A step is therefore recorded once per size and then
    replayed. All that differs between steps of one size is in memory that is allocated once: the tokens, their
    positions, the column `here`, and the bias, which hides the columns that are not filled yet.

    There are few sizes. The number of rows halves once half of them have ended, and the number of columns grows by
    WIDTH when they are full.
    """

    WIDTH = 256

    def start(self, tokens: Tensor, mask: Tensor, copies: int) -> Tensor:
        states = super().start(tokens, mask, copies)
        rows, columns = len(states), self.cache.shape[-2]
        self.cache[..., self.column :, :] = 0.0  # the bias hides these columns, but NaN left in memory would spread
        if self.bias is None:
            self.bias = states.new_zeros(rows, 1, 1, columns)
        self.bias[..., self.column :] = torch.finfo(states.dtype).min
        self.tokens, self.here = tokens.new_zeros(rows), tokens.new_tensor([self.column])
        self.steps: dict[tuple[int, int], Callable[[], Tensor]] = {}
        return states

    def advance(self, tokens: Tensor) -> Tensor:
        n = len(tokens)
        self.tokens[:n] = tokens
        self.column += 1
        size = self._rows(n), min(next_multiple(self.column, self.WIDTH), self.cache.shape[-2])
        if size in self.steps:
            states = self.steps[size]()
        else:  # the first step runs normally, so that libraries initialize before the recording
            step = partial(self._step, *size)
            states = step()
            self.steps[size] = record_graph(step)
        return states[:n]

    def _rows(self, active: int) -> int:
        rows = len(self.tokens)
        while rows >= 2 * active:
            rows = (rows + 1) // 2
        return rows

    def _step(self, rows: int, columns: int) -> Tensor:
        positions = self.positions[:rows]
        bias = cast(Tensor, self.bias).index_fill_(3, self.here, 0.0)[:rows, ..., :columns]
        rotation = self.cos[positions], self.sin[positions]

        def attend(index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key = (rotate(x, *rotation) for x in (query, key))
            cache = self.cache[index, :, :rows, :, :columns]
            cache.index_copy_(3, self.here, torch.stack([key, value]).unsqueeze(3))
            return self._attend(query, cache, bias)

        states = run_layers(self.trunk, self.tokens[:rows], attend)
        self.positions += 1
        self.here += 1
        return states


def record_graph(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record the step as a CUDA graph, without running it. Return the step itself if it cannot be recorded."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            states = step()
    except RuntimeError:
        return step

    def replay() -> Tensor:
        graph.replay()
        return states

    return replay
