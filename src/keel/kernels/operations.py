"""The kernels as functions of tensors. Results are float32, if nothing else is said, and contiguous.

Names with `_back` compute gradients.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from keel.kernels.library import library

BLOCK = 64
"""Number of tokens over which one thread sums the gradient of a norm's weight."""

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine [N, 1, D / 2] of the angles by which queries and keys are rotated."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute the RMS norm over the last dimension, and the scales 1 / sqrt(mean(x^2) + eps).

    [..., H], [H] -> [..., H] of the type of the weight, [...]
    """
    x = x.contiguous()
    *shape, size = x.shape
    y, scales = torch.empty_like(x, dtype=weight.dtype), x.new_empty(shape)
    call("norm" + _suffix(y), x, _wide(weight), scales.numel(), size, eps, _threads(x), y, scales)
    return y, scales


def rms_norm_back(x: Tensor, weight: Tensor, scales: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of x and weight, of their types. The gradient has the type of the weight."""
    x, gradient = x.contiguous(), gradient.contiguous()
    count, size = scales.numel(), x.shape[-1]
    for_x, for_weight = torch.empty_like(x), x.new_empty(-(-count // BLOCK), size)
    inputs = x, _wide(weight), scales, gradient, count, size, BLOCK, _threads(x)
    call("norm_back" + _suffix(gradient), *inputs, for_x, for_weight)
    return for_x, for_weight.sum(0).to(weight.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x weight^T + bias, fast for few rows. [..., in], [out, in], [out] -> [..., out]

    If the weight is bfloat16, x is rounded to bfloat16, and sums and result are float32. The result of a row does not
    depend on the other rows.

    Raises ValueError for other shapes.
    """
    return _map("linear" + _suffix(weight), x, weight, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `linear` with a bfloat16 weight, fast for many rows."""
    return _map("product_bfloat16", x, weight, bias)


def _map(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(f"x {list(x.shape)}, weight {list(weight.shape)}: the numbers of inputs or outputs differ")
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    (outputs, size), y = weight.shape, x.new_empty(*x.shape[:-1], len(weight))
    rows = x.numel() // size
    threads = torch.get_num_threads() if rows * weight.numel() >= 2**18 else 1
    if weight.dtype is torch.bfloat16:
        given, x = x, torch.empty_like(x)  # holds floats or bfloat16 numbers, as the processor multiplies them
        call("round_rows", given, given.numel(), x)
    call(name, x, weight, bias, rows, outputs, size, threads, y)
    return y


def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) * up, of equal shapes and types."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    call("gated" + _suffix(gate), gate, up, gate.numel(), _threads(gate), y)
    return y


def silu_gate_back(gate: Tensor, up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of gate and up."""
    gate, up, gradient = gate.contiguous(), up.contiguous(), gradient.contiguous()
    for_gate, for_up = torch.empty_like(gate), torch.empty_like(up)
    call("gated_back" + _suffix(gate), gate, up, gradient, gate.numel(), _threads(gate), for_gate, for_up)
    return for_gate, for_up


def logprobs_with_entropy(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Compute log-probs, entropies and the statistics for the gradient. [..., V], [...] int64 -> [...], [...], [..., 3]

    Raises IndexError for a token outside of the vocabulary.
    """
    logits, tokens = logits.contiguous(), tokens.contiguous()
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < logits.shape[-1]:
        raise IndexError(f"tokens from {int(tokens.min())} to {int(tokens.max())}, but {logits.shape[-1]} logits")
    logprobs, entropies, statistics = (logits.new_empty(*tokens.shape, *more) for more in ((), (), (3,)))
    inputs = logits, tokens, tokens.numel(), logits.shape[-1], temperature, _threads(logits)
    call("logprobs", *inputs, logprobs, entropies, statistics)
    return logprobs, entropies, statistics


def logprobs_with_entropy_back(
    logits: Tensor,
    tokens: Tensor,
    statistics: Tensor,
    gradient: Tensor,
    entropy_gradient: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Compute the gradient of the logits from those of the log-probs and, if not None, of the entropies."""
    logits, tokens, gradient = logits.contiguous(), tokens.contiguous(), gradient.contiguous()
    entropy_gradient = None if entropy_gradient is None else entropy_gradient.contiguous()
    for_logits = torch.empty_like(logits)
    inputs = logits, tokens, statistics, gradient, entropy_gradient, tokens.numel(), logits.shape[-1], temperature
    call("logprobs_back", *inputs, _threads(logits), for_logits)
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
    """Compute causal attention within packed rows, where row r has the tokens starts[r] to starts[r + 1].

    query [N, heads, D], key and value [N, kv_heads, D], D a multiple of 8, starts [rows + 1] int64 on the CPU
    -> attended values [N, heads, D], and the statistics for the gradient [N, heads, 2]
    """
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    attended, statistics = torch.empty_like(query), query.new_empty(*query.shape[:2], 2)
    inputs = query, key, value, *_angles(rotation), *_shape(query, key, starts, scaling, window)
    call("attend", *inputs, attended, statistics)
    return attended, statistics


def attend_back(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    scaling: float,
    rotation: Rotation | None,
    window: int | None,
    attended: Tensor,
    statistics: Tensor,
    gradient: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of query, key and value. `attended` and `statistics` are the results of `attend`."""
    query, key, value, gradient = query.contiguous(), key.contiguous(), value.contiguous(), gradient.contiguous()
    gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    inputs = query, key, value, *_angles(rotation), attended, statistics, gradient
    call("attend_back", *inputs, *_shape(query, key, starts, scaling, window), *gradients)
    return gradients


@cache
def lanes() -> int:
    """Return the width of a vector register in float32 numbers, which is also the number of columns per cache block.

    0 without compiled kernels.
    """
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
    """Compute the attention of each row's newest token, and add its key and value to the cache at `column`.

    query [n, heads, D], key and value [n, kv_heads, D] -> [n, heads, D]

    Args:
        rotation: cosine and sine [n, 1, D / 2].
        first: [n] int64, the first column of each row that is not padding.
        cache: [2, >= n, kv_heads, T / lanes, D, lanes] of keys and values.
    """
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    (n, heads, size), columns, attended = query.shape, cache.shape[3] * cache.shape[5], torch.empty_like(query)
    shape = n, heads, key.shape[1], size, columns, column, scaling, _threads(query)
    call("attend_newest", query, key, value, *rotation, first, *shape, cache[0], cache[1], attended)
    return attended


def draw(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sample tokens by inverting the cumulative distribution. [n, V], [n] float64 -> tokens [n], log-probs [n]"""
    logits, uniforms = logits.contiguous(), uniforms.contiguous()
    tokens, logprobs = logits.new_empty(len(logits), dtype=torch.int64), logits.new_empty(len(logits))
    call("draw", logits, uniforms, *logits.shape, temperature, _threads(logits), tokens, logprobs)
    return tokens, logprobs


def _angles(rotation: Rotation | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if rotation is None else rotation


def _shape(query: Tensor, key: Tensor, starts: Tensor, scaling: float, window: int | None) -> tuple[Any, ...]:
    _, heads, size = query.shape
    return starts, len(starts) - 1, heads, key.shape[1], size, scaling, window or 0, _threads(query)


def _suffix(x: Tensor) -> str:
    """Return the end of the name of the operation for this type."""
    return "_bfloat16" if x.dtype is torch.bfloat16 else ""


def _wide(x: Tensor) -> Tensor:
    return x.float().contiguous()


def _threads(x: Tensor) -> int:
    """Return torch's number of threads, or 1 for a tensor too small to share."""
    return torch.get_num_threads() if x.numel() >= 2**14 else 1


def call(name: str, *arguments: Tensor | int | float | None) -> None:
    """Call a compiled operation. Tensors are passed as pointers to their memory and must be contiguous."""
    _kernel(name)(*[x.data_ptr() if isinstance(x, Tensor) else x for x in arguments])


# ctypes does not check these signatures: they must match the C functions. All pointers are to contiguous tensors.
P, N, L, F, D = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_double
SHAPE = (P, N, N, N, N, F, N, N)
SIGNATURES = {
    "norm": (P, P, L, N, F, N, P, P),
    "norm_bfloat16": (P, P, L, N, F, N, P, P),
    "norm_back": (P, P, P, P, L, N, N, N, P, P),
    "norm_back_bfloat16": (P, P, P, P, L, N, N, N, P, P),
    "linear": (P, P, P, N, L, N, N, P),
    "linear_bfloat16": (P, P, P, N, L, N, N, P),
    "product_bfloat16": (P, P, P, N, L, N, N, P),
    "round_rows": (P, L, P),
    "advance": (P, N, N, P, P, P, P, N, N, N, N, N, N, N, N, F, F, N, P),
    "gated": (P, P, L, N, P),
    "gated_bfloat16": (P, P, L, N, P),
    "gated_back": (P, P, P, L, N, P, P),
    "gated_back_bfloat16": (P, P, P, L, N, P, P),
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
    assert compiled is not None, "check `available` first"
    kernel = getattr(compiled, name)
    kernel.argtypes, kernel.restype = SIGNATURES[name], None
    return kernel
