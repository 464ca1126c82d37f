"""The few operations that a small model's time goes into, in C, compiled for this processor when first used.

Each does in one pass over memory what takes several in torch. They serve float32 on a CPU; for all else, and where
there is no C compiler, the callers compute the same in torch. KEEL_KERNELS=off turns them off.
"""

from keel.kernels.library import available
from keel.kernels.operations import (
    Rotation,
    attend,
    attend_back,
    attend_newest,
    draw,
    lanes,
    logprobs_with_entropy,
    logprobs_with_entropy_back,
    rms_norm,
    rms_norm_back,
    silu_gate,
    silu_gate_back,
)

__all__ = [
    "Rotation",
    "attend",
    "attend_back",
    "attend_newest",
    "available",
    "draw",
    "lanes",
    "logprobs_with_entropy",
    "logprobs_with_entropy_back",
    "rms_norm",
    "rms_norm_back",
    "silu_gate",
    "silu_gate_back",
]
