"""Weights that are used in 16 bits and learn in float32 (mixed precision, Micikevicius et al. 2018).

A bfloat16 weight of 0.02 has its next neighbours 1e-4 away, and an AdamW step of 1e-5 that is added to it is lost.
So each trained 16-bit weight has a float32 master, which the optimizer moves. The weight is its master rounded.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW

from keel.models.rounding import widen


class MasterAdamW(AdamW):
    """AdamW that moves the masters of 16-bit weights, and rounds them back into the weights after each step."""

    def __init__(self, groups: list[dict[str, Any]], masters: Mapping[Parameter, Parameter], **settings: Any) -> None:
        """Args: `groups` hold masters in the place of the weights that have one; `masters` is weight -> master."""
        super().__init__(groups, **settings)
        self.masters = dict(masters)
        self.register_step_pre_hook(_take_gradients)
        self.register_step_post_hook(_round_masters)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for weight in self.masters:
            weight.grad = None


def _take_gradients(optimizer: Any, *_: Any) -> None:
    for weight, master in optimizer.masters.items():
        master.grad = weight.grad


@torch.no_grad()
def _round_masters(optimizer: Any, *_: Any) -> None:
    for weight, master in optimizer.masters.items():
        if master.grad is not None:
            weight.copy_(master)
            master.grad = None


def with_master(weight: Parameter) -> Parameter:
    """Return a float32 master of a 16-bit weight, whose gradient is accumulated in float32 from now on."""
    weight.grad_dtype = torch.float32
    return Parameter(widen(weight))


def needs_master(weight: Parameter) -> bool:
    return weight.is_floating_point() and weight.dtype.itemsize < 4


def trained_weights(optimizer: AdamW, named: Iterable[tuple[str, Parameter]]) -> dict[str, Tensor]:
    """Return what the optimizer trains of these parameters, by name: masters where there are any, else the weights."""
    masters: Mapping[Parameter, Parameter] = getattr(optimizer, "masters", {})
    trained = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    held = ((name, masters.get(weight, weight)) for name, weight in named)
    return {name: weight.detach() for name, weight in held if id(weight) in trained}


@torch.no_grad()
def load_trained_weights(
    optimizer: AdamW, named: Iterable[tuple[str, Parameter]], load: Callable[[str, Tensor], object]
) -> None:
    """Load what `trained_weights` returns, and the 16-bit weights of the masters.

    Args:
        load: copies the weight of a name into a tensor.
    """
    for name, weight in trained_weights(optimizer, named).items():
        load(name, weight)
    for weight, master in getattr(optimizer, "masters", {}).items():
        weight.copy_(master)
