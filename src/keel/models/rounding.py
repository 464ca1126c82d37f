"""Float32 values for weights that a file holds in 16 bits."""

import torch
from torch import Tensor

_HALF = 1 << 15  # half the distance between neighbouring bfloat16 numbers, in units of the last bit of float32


@torch.no_grad()
def widen(weight: Tensor) -> Tensor:
    """Return float32 values that round to the given bfloat16 weight, spread evenly over its rounding interval (dither).

    If all values were in the middle of their intervals, training would change no rounded weight until a value has moved
    by half an interval, and the model would compute with its old weights for the first steps. Of values that are spread
    evenly, a move by 1% of an interval takes 1% over its edge, so that the rounded weights move as the values do.

    Zeros, NaN and infinite values stay as they are. The same weight gives the same values on every process.
    """
    wide = weight.detach().float()
    if weight.dtype != torch.bfloat16:
        return wide
    bits = wide.view(torch.int32)
    generator = torch.Generator(weight.device).manual_seed(int(bits.sum(dtype=torch.int64)))
    offset = torch.randint(-_HALF + 1, _HALF, wide.shape, dtype=torch.int16, device=weight.device, generator=generator)
    bits += offset.masked_fill_((wide == 0) | ~wide.isfinite(), 0)
    return wide
