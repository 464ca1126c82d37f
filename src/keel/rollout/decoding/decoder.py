"""One token more for every row: the models' forward passes while answers are sampled.

`LayerDecoder` walks through the layers of Llama-like models itself, over a cache allocated once, in a fraction of the
small operations that the modules of transformers take; `KernelDecoder` with the compiled kernels of a CPU,
`GraphDecoder` as a recording that a GPU plays back. `ModuleDecoder` does it for any other causal model, and
`FullDecoder` for those whose cache does not serve.
All give the hidden state [n, H] of the last token of each row, which the output matrix turns into logits.
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
        """Go on with these rows, in this order. [m]"""
        ...


def choose_decoder(model: Any, max_response_tokens: int) -> Decoder:
    """The fastest decoder that knows the model."""
    layers: Any = trunk(model)
    if not has_known_layers(layers):
        return module_decoder(model)
    if layers.embed_tokens.weight.is_cuda:
        return GraphDecoder(layers, max_response_tokens)
    kind = KernelDecoder if fits_kernels(layers) else LayerDecoder
    return kind(layers, max_response_tokens)


def fits_kernels(trunk: Any) -> bool:
    return trunk.layers[0].self_attn.head_dim % 8 == 0 and kernels.available(trunk.embed_tokens.weight)
