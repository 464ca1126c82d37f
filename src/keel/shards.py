"""Tensors of which each process holds some rows (DTensor), and plain tensors, under one set of functions."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return all rows of a tensor, on every process. Every process must call it."""
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the rows of a tensor that this process holds; they share its memory."""
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local


@dataclass(frozen=True)
class LocalRows:
    """The rows of a tensor that this process holds, as a checkpoint addresses them."""

    first: int
    values: Tensor
    is_copy: bool  # another process holds the same rows and comes before this one

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> "LocalRows":
        """Return the rows of a tensor, which share its memory. All processes hold all rows of a plain tensor."""
        if not isinstance(tensor, DTensor):
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            return cls(0, tensor, is_copy=rank > 0)
        mesh, sharded = tensor.device_mesh, tensor.device_mesh.ndim - 1  # the last dimension divides the rows
        place = mesh.get_local_rank(sharded)
        per_process = -(-tensor.shape[0] // mesh.size(sharded))  # rows are divided like torch.chunk does it
        replica = mesh.get_local_rank(0) if sharded else 0
        return cls(min(place * per_process, tensor.shape[0]), tensor.to_local(), is_copy=replica > 0)
