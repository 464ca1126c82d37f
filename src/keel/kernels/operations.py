"""The kernels on tensors. Results are float32 and contiguous; a name with `_back` gives gradients."""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from keel.kernels.library import library

BLOCK = 64
"""Tokens whose gradients of a norm's weight are summed by one thread."""

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine [N, 1, D / 2] by which queries and keys turn."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMS norm over the last dimension, and what each x was multiplied by. [..., H], [H] -> [..., H], [...]"""
    x, weight = x.contiguous(), weight.contiguous()
    *shape, size = x.shape
    y, scales = torch.empty_like(x), x.new_empty(shape)
    _call("norm", x, weight, scales.numel(), size, eps, _threads(x), y, scales)
    return y, scales


def rms_norm_back(x: Tensor, weight: Tensor, scales: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """-> gradients of x and weight"""
    x, weight, gradient = x.contiguous(), weight.contiguous(), gradient.contiguous()
    count, size = scales.numel(), x.shape[-1]
    for_x, for_weight = torch.empty_like(x), x.new_empty(-(-count // BLOCK), size)
    _call("norm_back", x, weight, scales, gradient, count, size, BLOCK, _threads(x), for_x, for_weight)
    return for_x, for_weight.sum(0)


def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of equal shapes."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    _call("gated", gate, up, gate.numel(), _threads(gate), y)
    return y


def silu_gate_back(gate: Tensor, up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """-> gradients of gate and up"""
    gate, up, gradient = gate.contiguous(), up.contiguous(), gradient.contiguous()
    for_gate, for_up = torch.empty_like(gate), torch.empty_like(up)
    _call("gated_back", gate, up, gradient, gate.numel(), _threads(gate), for_gate, for_up)
    return for_gate, for_up


def logprobs_with_entropy(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of each token, entropy, and what the gradient needs. [..., V], [...] int64 -> [...], [...], [..., 3]

    Raises IndexError for a token that is none of the V.
    """
    logits, tokens = logits.contiguous(), tokens.contiguous()
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < logits.shape[-1]:
        raise IndexError(f"tokens from {int(tokens.min())} to {int(tokens.max())}, but {logits.shape[-1]} logits")
    found, entropies, statistics = (logits.new_empty(*tokens.shape, *more) for more in ((), (), (3,)))
    given = logits, tokens, tokens.numel(), logits.shape[-1], temperature, _threads(logits)
    _call("logprobs", *given, found, entropies, statistics)
    return found, entropies, statistics


def logprobs_with_entropy_back(
    logits: Tensor,
    tokens: Tensor,
    statistics: Tensor,
    gradient: Tensor,
    entropy_gradient: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Return the gradient of the logits from those of the log-probs and, if given, of the entropies."""
    logits, tokens, gradient = logits.contiguous(), tokens.contiguous(), gradient.contiguous()
    entropy_gradient = None if entropy_gradient is None else entropy_gradient.contiguous()
    for_logits = torch.empty_like(logits)
    given = logits, tokens, statistics, gradient, entropy_gradient, tokens.numel(), logits.shape[-1], temperature
    _call("logprobs_back", *given, _threads(logits), for_logits)
    return for_logits


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    scaling: float,
    rotation: Rotation | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention within packed rows; row r has the tokens starts[r] to starts[r + 1].

    query [N, heads, D], key and value [N, kv_heads, D], D a multiple of 8, starts [rows + 1] int64 on the CPU
    -> [N, heads, D], and what the gradient needs [N, heads, 2]
    """
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    found, statistics = torch.empty_like(query), query.new_empty(*query.shape[:2], 2)
    _call(
        "attend", query, key, value, *_turned(rotation), *_shape(query, key, starts, scaling, window), found, statistics
    )
    return found, statistics


def attend_back(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    scaling: float,
    rotation: Rotation | None,
    window: int | None,
    found: Tensor,
    statistics: Tensor,
    gradient: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of query, key and value"""
    query, key, value, gradient = query.contiguous(), key.contiguous(), value.contiguous(), gradient.contiguous()
    gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    given = query, key, value, *_turned(rotation), found, statistics, gradient
    _call("attend_back", *given, *_shape(query, key, starts, scaling, window), *gradients)
    return gradients


@cache
def lanes() -> int:
    """How many numbers the kernels take at a time, and how many columns make a block of a cache."""
    compiled = library()
    return int(compiled.lanes()) if compiled is not None else 0


def attend_newest(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Rotation,
    first: Tensor,
    cache: Tensor,
    column: int,
    scaling: float,
) -> Tensor:
    """Attention of each row's newest token, whose key and value are added to the cache at `column`.

    query [n, heads, D], key and value [n, kv_heads, D], rotation [n, 1, D / 2] twice, first [n] int64: the columns
    before it are padding; cache [2, >= n, kv_heads, T / lanes, D, lanes] of keys and values -> [n, heads, D]
    """
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    (n, heads, size), columns, found = query.shape, cache.shape[3] * cache.shape[5], torch.empty_like(query)
    given = query, key, value, *rotation, first, n, heads, key.shape[1], size, columns, column, scaling, _threads(query)
    _call("attend_newest", *given, cache[0], cache[1], found)
    return found


def draw(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Tokens by inverting the cumulative distribution, and their log-probabilities. [n, V], [n] float64 -> [n], [n]"""
    logits, uniforms = logits.contiguous(), uniforms.contiguous()
    tokens, found = logits.new_empty(len(logits), dtype=torch.int64), logits.new_empty(len(logits))
    _call("draw", logits, uniforms, *logits.shape, temperature, _threads(logits), tokens, found)
    return tokens, found


def _turned(rotation: Rotation | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if rotation is None else rotation


def _shape(query: Tensor, key: Tensor, starts: Tensor, scaling: float, window: int | None) -> tuple[Any, ...]:
    _, heads, size = query.shape
    return starts, len(starts) - 1, heads, key.shape[1], size, scaling, window or 0, _threads(query)


def _threads(x: Tensor) -> int:
    """As many as torch uses, where there is work for them."""
    return torch.get_num_threads() if x.numel() >= 2**14 else 1


def _call(name: str, *given: Tensor | int | float | None) -> None:
    _kernel(name)(*[x.data_ptr() if isinstance(x, Tensor) else x for x in given])


P, N, L, F, D = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_double
SHAPE = (P, N, N, N, N, F, N, N)
SIGNATURES = {
    "norm": (P, P, L, N, F, N, P, P),
    "norm_back": (P, P, P, P, L, N, N, N, P, P),
    "gated": (P, P, L, N, P),
    "gated_back": (P, P, P, L, N, P, P),
    "logprobs": (P, P, L, N, D, N, P, P, P),
    "logprobs_back": (P, P, P, P, P, L, N, F, N, P),
    "attend_newest": (P, P, P, P, P, P, N, N, N, N, N, N, F, N, P, P, P),
    "draw": (P, P, L, N, D, N, P, P),
    "attend": (P, P, P, P, P, *SHAPE, P, P),
    "attend_back": (P, P, P, P, P, P, P, P, *SHAPE, P, P, P),
}


@cache
def _kernel(name: str) -> Callable[..., None]:
    compiled = library()
    assert compiled is not None, "ask `available` first"
    kernel = getattr(compiled, name)
    kernel.argtypes, kernel.restype = SIGNATURES[name], None
    return kernel
