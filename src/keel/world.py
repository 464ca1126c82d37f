"""The machine a run sees: rank, size, device, random streams and reductions. The same code path at size 1."""

import atexit
import hashlib
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from keel.errors import ConfigError


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @staticmethod
    def from_environment() -> "World":
        """Read torchrun's variables once (none set: one process) and join its process group."""
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        if size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
            atexit.register(dist.destroy_process_group)
        return World(rank, size, device)

    @staticmethod
    def single() -> "World":
        """The world of a verb that runs in one process. Raises ConfigError under torchrun with more."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("this verb runs in one process", where="torchrun", fix="call it without torchrun")
        return World.from_environment()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This rank's part of `count` items, which the size must divide."""
        part = count // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks; at size 1 the tensor itself."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def gather(self, tensor: Tensor) -> Tensor:
        """All ranks' tensors of equal shape, joined along the first dimension in rank order."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def generator(*key: int | str) -> torch.Generator:
    """A random stream that depends on its key alone, such as (seed, "sample", step).

    Streams carry no state from step to step, so a resumed run draws what the straight run would have drawn.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
