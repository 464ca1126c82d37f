"""The layers of a Llama-like model for the newest token of each row, in one call."""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from keel.kernels.operations import Rotation, call


class Map(NamedTuple):
    """A linear map: weight [outputs, inputs], float32 or bfloat16, and bias [outputs], float32; both contiguous."""

    weight: Tensor
    bias: Tensor | None


class Layer(NamedTuple):
    """The weights of a layer. The norms [H], and those of queries and keys [D], are float32 and contiguous."""

    attention_norm: Tensor
    unit_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    query: Map
    key: Map
    value: Map
    output: Map
    gate: Map
    up: Map
    down: Map


class LayerTable:
    """Layers as the compiled code reads them. All maps have the same type of weights.

    Attributes:
        heads, kv_heads, size: of the attention; `size` is that of a head.
    """

    def __init__(self, layers: Sequence[Layer], heads: int, kv_heads: int, size: int, scaling: float, eps: float):
        self.heads, self.kv_heads, self.size, self.scaling, self.eps = heads, kv_heads, size, scaling, eps
        self._layers = list(layers)  # keeps the memory that the records point to
        self._records = (_LayerRecord * len(layers))(*[_record(layer) for layer in self._layers])
        self._narrow = int(layers[0].query.weight.dtype is torch.bfloat16)

    def advance(self, states: Tensor, rotation: Rotation, first: Tensor, cache: Tensor, column: int) -> Tensor:
        """Run the layers, and add the keys and values to the cache at `column`. [n, H] -> [n, H]

        Args:
            rotation: cosine and sine [n, 1, D / 2].
            first: [n] int64, the first column of each row that is not padding.
            cache: [layers, 2, >= n, kv_heads, T / lanes, D, lanes] of keys and values, contiguous.
        """
        states = states.contiguous().clone()
        rows, width = states.shape
        shape = rows, width, self.heads, self.kv_heads, self.size, cache.shape[4] * cache.shape[6], column
        layers = ctypes.addressof(self._records), len(self._layers), self._narrow
        numbers = cache.shape[2], self.scaling, self.eps, torch.get_num_threads()
        call("advance", *layers, states, *rotation, first, *shape, *numbers, cache)
        return states


class _MapRecord(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
    )


class _LayerRecord(ctypes.Structure):
    """`layer` in advance.c"""

    _fields_ = tuple(
        (name, _MapRecord if kind is Map else ctypes.c_void_p) for name, kind in Layer.__annotations__.items()
    )


def _record(layer: Layer) -> _LayerRecord:
    def pointer(x: Tensor | None) -> int | None:
        return None if x is None else x.data_ptr()

    def part(x: Tensor | Map | None) -> "_MapRecord | int | None":
        return _MapRecord(pointer(x.weight), pointer(x.bias), *x.weight.shape) if isinstance(x, Map) else pointer(x)

    return _LayerRecord(*map(part, layer))
