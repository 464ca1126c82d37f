"""One token more for every row: the models' forward passes while answers are sampled.

`LayerDecoder` walks through the layers of Llama-like models itself, over a cache allocated once, in a fraction of the
small operations that the modules of transformers take; `KernelDecoder` with the compiled kernels of a CPU,
`GraphDecoder` as a recording that a GPU plays back. `ModuleDecoder` does it for any other causal model.
All give the hidden state [n, H] of the last token of each row, which the output matrix turns into logits.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from keel import kernels
from keel.models.heads import plain, positions_for, trunk
from keel.models.layers import is_known
from keel.rollout.kernel_decoder import KernelDecoder
from keel.rollout.layer_decoder import GraphDecoder, LayerDecoder


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
    layers: Any = trunk(model)
    if not is_known(layers):
        return ModuleDecoder(model)
    if layers.embed_tokens.weight.is_cuda:
        return GraphDecoder(layers, max_response_tokens)
    kind = KernelDecoder if fits_kernels(layers) else LayerDecoder
    return kind(layers, max_response_tokens)


def fits_kernels(trunk: Any) -> bool:
    return trunk.layers[0].self_attn.head_dim % 8 == 0 and kernels.available(trunk.embed_tokens.weight)


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
        states: Tensor = output.last_hidden_state[:, -1]
        return states
