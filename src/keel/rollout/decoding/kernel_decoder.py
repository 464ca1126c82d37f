"""Decoding through the layers of Llama-like models with the compiled kernels of a CPU."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from keel import kernels
from keel.data.padding import next_multiple
from keel.models.attention import Layout
from keel.models.layers import apply_rms_norm, layer_table, lightweight_layers, rotate, rotations, run_layers


class KernelDecoder:
    """Decodes with the compiled kernels. Prompts are read without padding.

    Of a model in bfloat16, only the inputs of linear maps are rounded: the kernels compute all the rest in float32,
    which is closer to the exact log-probabilities, and faster.

    The cache of a layer is in blocks of columns, [2, B, kv_heads, T / lanes, D, lanes], so that a vector register holds
    one number of as many past tokens as it has lanes.
    """

    def __init__(self, trunk: Any, max_response_tokens: int) -> None:
        self.trunk, self.max_response_tokens = lightweight_layers(trunk, torch.float32), max_response_tokens
        self.rotations = partial(rotations, trunk)
        attention = trunk.layers[0].self_attn
        self.size, self.scaling = attention.head_dim, attention.scaling
        self.table = layer_table(trunk)

    def start(self, tokens: Tensor, mask: Tensor, copies: int) -> Tensor:
        (count, self.column), lanes = tokens.shape, kernels.lanes()
        columns = next_multiple(self.column + self.max_response_tokens, lanes)
        config, layers = self.trunk.config, len(self.trunk.layers)
        heads = config.num_key_value_heads
        self.cache = torch.zeros(layers, 2, count * copies, heads, columns // lanes, self.size, lanes)
        self.cos, self.sin = self.rotations(torch.arange(columns))
        lengths, order = mask.sum(1).sort(descending=True, stable=True)
        tokens, mask, back = tokens[order], mask[order], order.argsort()
        positions = (mask.cumsum(1) - 1)[mask]
        layout, rotation = Layout(lengths.tolist(), tokens.device), (self.cos[positions], self.sin[positions])
        width = next_multiple(self.column, lanes)
        blank = torch.zeros(count, width, heads, self.size)
        place = pad(mask, (0, width - self.column))[..., None, None]

        def read(index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            for kind, flat in enumerate((rotate(key, *rotation), value)):
                in_blocks = blank.masked_scatter(place, flat).unflatten(1, (-1, lanes)).permute(0, 3, 1, 4, 2)
                self.cache[index, kind, :, :, : width // lanes] = in_blocks[back].repeat_interleave(copies, 0)
            return layout.attend(query, key, value, self.scaling, rotation=rotation)

        states = run_layers(self.trunk, tokens[mask], read)
        self.positions = lengths[back].repeat_interleave(copies)
        self.first = self.column - self.positions
        return states[lengths.cumsum(0) - 1][back].repeat_interleave(copies, 0)

    def advance(self, tokens: Tensor) -> Tensor:
        assert self.column < self.cache.shape[4] * self.cache.shape[6]
        rotation = self.cos[self.positions], self.sin[self.positions]
        states = self._run_layers(tokens, rotation)
        self.positions = self.positions + 1
        self.column += 1
        return states

    def _run_layers(self, tokens: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        if self.table is not None:
            embedded = self.trunk.embed_tokens(tokens)
            states = self.table.advance(embedded, rotation, self.first, self.cache, self.column)
            return apply_rms_norm(self.trunk.norm, states)

        def attend(index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            cache = self.cache[index]
            return kernels.attend_newest(query, key, value, rotation, self.first, cache, self.column, self.scaling)

        return run_layers(self.trunk, tokens, attend)

    def keep(self, rows: Tensor) -> None:
        # Only rows that move are copied, in all layers at once.
        moved = (rows != torch.arange(len(rows))).nonzero().squeeze(1)
        if len(moved):
            used = self.cache[:, :, :, :, : self.column // kernels.lanes() + 1]
            used[:, :, moved] = used[:, :, rows[moved]]
        self.positions, self.first = self.positions[rows], self.first[rows]
