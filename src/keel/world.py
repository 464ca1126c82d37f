"""The machine a run sees: rank, size, device, random streams and reductions. The same code path at size 1."""

import atexit
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from keel.errors import ConfigError, ProcessLost, RewardError

COLLECTIVE_SECONDS = 1800
"""How long a process waits for the others, who may be waiting for their scorers (KEEL_COLLECTIVE_SECONDS)."""


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
            patience = timedelta(seconds=float(os.environ.get("KEEL_COLLECTIVE_SECONDS", COLLECTIVE_SECONDS)))
            dist.init_process_group("nccl" if cuda else "gloo", timeout=patience, device_id=device if cuda else None)
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
        with _all_there():
            dist.all_reduce(total)
        return total

    def any(self, here: bool) -> bool:
        """Whether it is so on some rank."""
        return float(self.sum(torch.tensor(float(here), device=self.device))) > 0

    def gather(self, tensor: Tensor) -> Tensor:
        """All ranks' tensors of equal shape, joined along the first dimension in rank order."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        with _all_there():
            dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def barrier(self) -> None:
        if self.size > 1:
            with _all_there():
                dist.barrier()


def raise_together(world: World, job: Callable[[], Any]) -> Any:
    """Return the result of `job`, which every process runs.

    Raises RewardError on all processes where any of them raises it, so that none waits for the one that failed.
    """
    results, error = [], None
    try:
        results = [job()]
    except RewardError as caught:
        error = caught
    if world.any(error is not None):
        raise error or RewardError("a scorer failed in another process", where="rewards")
    return results[0]


@contextmanager
def _all_there() -> Iterator[None]:
    """Raises ProcessLost when another process does not take part."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error):
            raise
        reason = str(error).strip().splitlines()[0][:200]
        raise ProcessLost(
            f"another process of this run is gone or does not answer ({reason})", "torchrun", "go on with --resume"
        ) from error


def generator(*key: int | str) -> torch.Generator:
    """A random stream that depends on its key alone, such as (seed, "sample", step).

    Streams carry no state from step to step, so a resumed run draws what the straight run would have drawn.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def at_once(*jobs: Callable[[], Any]) -> list[Any]:
    """The results of jobs that share no state, which run at the same time where there are processors for it.

    On a CPU each job takes an equal share of torch's threads: two models side by side keep two processors busier than
    one model whose small operations are split in two. With one thread, on a GPU, or inside another job, they run in
    turn. The first job's error is raised when all have ended.
    """
    threads = torch.get_num_threads()
    alone = threading.current_thread() is threading.main_thread()
    if min(threads, len(jobs)) == 1 or torch.cuda.is_available() or not alone:
        return [job() for job in jobs]
    run = partial(_with_threads, max(1, threads // len(jobs)), torch.is_grad_enabled())
    try:
        futures = [_workers().submit(run, job) for job in jobs]
        for future in futures:
            future.exception()  # waits
        done = [future.result() for future in futures]
    finally:
        torch.set_num_threads(threads)  # the matrix library counts threads for the whole process
    _waited[0] += max(seconds for _, seconds in done)
    return [result for result, _ in done]


def seconds_of_work() -> float:
    """Processor seconds of the calling thread, and each time of the longest of the jobs that `at_once` ran elsewhere.

    On a machine that does nothing else they grow as the clock does.
    """
    return time.thread_time() + _waited[0]


_waited = [0.0]
"""Processor seconds of the longest job, summed over the calls of `at_once`."""


def _with_threads(threads: int, gradients: bool, job: Callable[[], Any]) -> tuple[Any, float]:
    """The result of a job and its processor seconds."""
    began = time.thread_time()
    torch.set_num_threads(threads)
    with torch.set_grad_enabled(gradients):
        return job(), time.thread_time() - began


@cache
def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="keel")
