"""The operations that take most of a small model's time, in C, compiled for this processor on first use.

Each needs one pass over memory where torch needs several. They compute float32 on a CPU. For other types and devices,
and without a C compiler, the callers compute the same with torch. KEEL_KERNELS=off turns the kernels off.
"""

from keel.kernels.advance import Layer, LayerTable, Map
from keel.kernels.library import available
from keel.kernels.operations import (
    Rotation,
    attend,
    attend_back,
    attend_newest,
    draw,
    lanes,
    linear,
    logprobs_with_entropy,
    logprobs_with_entropy_back,
    product,
    rms_norm,
    rms_norm_back,
    silu_gate,
    silu_gate_back,
)

__all__ = [
    "Layer",
    "LayerTable",
    "Map",
    "Rotation",
    "attend",
    "attend_back",
    "attend_newest",
    "available",
    "draw",
    "lanes",
    "linear",
    "logprobs_with_entropy",
    "logprobs_with_entropy_back",
    "product",
    "rms_norm",
    "rms_norm_back",
    "silu_gate",
    "silu_gate_back",
]
