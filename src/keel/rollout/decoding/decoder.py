"""Decoders: the forward passes that append one token to every row while responses are sampled.

- `LayerDecoder` runs the layers of Llama-like models directly, over a cache that is allocated once. It needs far fewer
  small operations than the modules of transformers.
- `KernelDecoder` does the same with the compiled kernels, on a CPU.
- `GraphDecoder` does the same with recorded CUDA graphs, on a GPU.
- `ModuleDecoder` calls the forward pass of any other causal model, with its cache.
- `FullDecoder` reads each row again for every token, for models whose cache gives other states.

All return the hidden state [n, H] of the last token of each row, which the output matrix turns into logits.
"""

from typing import Any, Protocol

from torch import Tensor

from keel import kernels
from keel.models.heads import trunk
from keel.models.layers import has_known_layers
from keel.rollout.decoding.kernel_decoder import KernelDecoder
from keel.rollout.decoding.layer_decoder import GraphDecoder, LayerDecoder
from keel.rollout.decoding.module_decoder import module_decoder


class Decoder(Protocol):
    """Rows that grow token by token."""

    def start(self, tokens: Tensor, mask: Tensor, copies: int) -> Tensor:
        """Read U prompts [U, P], padded on the left, for `copies` rows each. -> [U * copies, H]"""
        ...

    def advance(self, tokens: Tensor) -> Tensor:
        """Append a token to each row. [n] -> [n, H]"""
        ...

    def keep(self, rows: Tensor) -> None:
        """Keep these rows, in this order, and drop the others. [m]"""
        ...


def choose_decoder(model: Any, max_response_tokens: int) -> Decoder:
    """Return the fastest decoder for the model."""
    layers: Any = trunk(model)
    if not has_known_layers(layers):
        return module_decoder(model)
    if layers.embed_tokens.weight.is_cuda:
        return GraphDecoder(layers, max_response_tokens)
    kind = KernelDecoder if fits_kernels(layers) else LayerDecoder
    return kind(layers, max_response_tokens)


def fits_kernels(trunk: Any) -> bool:
    """Return whether the compiled kernels can run these layers."""
    return trunk.layers[0].self_attn.head_dim % 8 == 0 and kernels.available(narrow=[trunk.embed_tokens.weight])
