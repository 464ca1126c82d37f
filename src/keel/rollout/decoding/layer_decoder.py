"""Decoding through the layers of Llama-like models with torch's operations, on any device."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from keel.data.padding import next_multiple
from keel.models.layers import light, rotate, rotations, walk


class LayerDecoder:
    """Decodes through the layers. B rows at the start, T columns of prompt and answer, D the size of a head."""

    def __init__(self, trunk: Any, max_response_tokens: int) -> None:
        self.trunk, self.max_response_tokens = light(trunk), max_response_tokens
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
        # A padded place looks at itself, so that no row of the softmax is empty; nothing looks at it.
        itself = torch.eye(self.column, dtype=torch.bool, device=mask.device)
        visible = ((mask.unsqueeze(1) & torch.ones_like(itself).tril()) | itself).unsqueeze(1)

        turn = self.cos[positions], self.sin[positions]

        def read(index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key = (rotate(x, *turn) for x in (query, key))
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            self.cache[index, 0, :, :, : self.column] = key.repeat_interleave(copies, 0)
            self.cache[index, 1, :, :, : self.column] = value.repeat_interleave(copies, 0)
            key, value = (x.repeat_interleave(self.groups, 1) for x in (key, value))
            found = scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=self.scaling)
            return found.transpose(1, 2)

        states = walk(self.trunk, tokens, read)
        self.positions = (positions[:, -1] + 1).repeat_interleave(copies)
        self.bias = None
        if not bool(mask.all()):  # the lowest number where a row is padded: added to its attention, it hides that place
            self.bias = weight.new_zeros(count * copies, 1, 1, columns)
            padded = ~mask.repeat_interleave(copies, 0)
            self.bias[:, 0, 0, : self.column].masked_fill_(padded, torch.finfo(weight.dtype).min)
        return states[:, -1].repeat_interleave(copies, 0)

    def advance(self, tokens: Tensor) -> Tensor:
        n, here = len(tokens), self.column
        self.column += 1
        bias = None if self.bias is None else self.bias[:n, ..., : self.column]

        turn = self.cos[self.positions[:n]], self.sin[self.positions[:n]]

        def attend(index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key = (rotate(x, *turn) for x in (query, key))
            cache = self.cache[index]
            cache[0, :n, :, here], cache[1, :n, :, here] = key, value
            return self._look(query, cache[:, :n, :, : self.column], bias)

        states = walk(self.trunk, tokens, attend)
        self.positions += 1
        return states

    def _look(self, query: Tensor, seen: Tensor, bias: Tensor | None) -> Tensor:
        """query [n, heads, D], keys and values seen [2, n, kv_heads, t, D] -> [n, heads, D]"""
        # The queries that share a key stand side by side: nothing of the cache is copied for them.
        grouped = query.unflatten(1, (-1, self.groups))
        return _one_query(grouped, seen[0], seen[1], bias, self.scaling).flatten(1, 2)

    def keep(self, rows: Tensor) -> None:
        """Only rows whose place changes are copied, in all layers at once."""
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero().squeeze(1)
        if len(moved):
            cache = self.cache[..., : self.column, :]
            cache[:, :, moved] = cache[:, :, rows[moved]]
            self.positions[moved] = self.positions[rows[moved]]
            if self.bias is not None:
                self.bias[moved] = self.bias[rows[moved]]


def _one_query(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """Attention of the newest tokens. query [n, kv_heads, groups, D]; keys, values [n, kv_heads, t, D]; bias
    [n, 1, 1, t] -> [n, kv_heads, groups, D]. On a CPU two plain products take half the time of the fused kernel."""
    if query.device.type != "cpu":
        return scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=scaling)
    weights = torch.bmm((query * scaling).flatten(0, 1), keys.flatten(0, 1).transpose(1, 2)).view(*query.shape[:3], -1)
    weights = weights if bias is None else weights.add_(bias)
    return torch.bmm(weights.softmax(-1).flatten(0, 1), values.flatten(0, 1)).view(query.shape)


class GraphDecoder(LayerDecoder):
    """The same as a recording: on a GPU the launches of a step take longer than its work, so a step is recorded once
    for a size and then played back whole. What differs between steps of a size therefore stands in memory that stays:
    the tokens, their positions, the column `here`, and the bias, which hides the columns to come.

    Sizes are few: half as many rows once so many have ended, and WIDTH more columns when those before are full.
    """

    WIDTH = 256

    def start(self, tokens: Tensor, mask: Tensor, copies: int) -> Tensor:
        states = super().start(tokens, mask, copies)
        rows, columns = len(states), self.cache.shape[-2]
        self.cache[..., self.column :, :] = 0.0  # hidden, but a NaN left in memory would show through
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
        else:  # run as it is, so that libraries set themselves up before anything is recorded
            step = partial(self._step, *size)
            states = step()
            self.steps[size] = record_graph(step)
        return states[:n]

    def _rows(self, wanted: int) -> int:
        rows = len(self.tokens)
        while rows >= 2 * wanted:
            rows = (rows + 1) // 2
        return rows

    def _step(self, rows: int, columns: int) -> Tensor:
        positions = self.positions[:rows]
        bias = cast(Tensor, self.bias).index_fill_(3, self.here, 0.0)[:rows, ..., :columns]
        turn = self.cos[positions], self.sin[positions]

        def attend(index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key = (rotate(x, *turn) for x in (query, key))
            seen = self.cache[index, :, :rows, :, :columns]
            seen.index_copy_(3, self.here, torch.stack([key, value]).unsqueeze(3))
            return self._look(query, seen, bias)

        states = walk(self.trunk, self.tokens[:rows], attend)
        self.positions += 1
        self.here += 1
        return states


def record_graph(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step as a CUDA graph, which recording does not run; or as it is, where it cannot be recorded."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step()
    except RuntimeError:
        return step

    def play() -> Tensor:
        graph.replay()
        return found

    return play
