"""The processes of a run: rank, size, device, reductions and random streams. The same code runs at size 1."""

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
"""seconds that a process waits for the others, whose scorers may be slow; KEEL_COLLECTIVE_SECONDS overrides it"""


@dataclass(frozen=True)
class World:
    """The processes of a run as one of them sees them."""

    rank: int
    size: int
    device: torch.device

    @staticmethod
    def from_environment() -> "World":
        """Read the variables of torchrun and join its process group. Without them, return a world of one process."""
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        if size > 1 and not dist.is_initialized():
            timeout = timedelta(seconds=float(os.environ.get("KEEL_COLLECTIVE_SECONDS", COLLECTIVE_SECONDS)))
            dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout, device_id=device if cuda else None)
            atexit.register(dist.destroy_process_group)
        return World(rank, size, device)

    @staticmethod
    def single() -> "World":
        """Return a world of one process. Raises ConfigError under torchrun with more."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("this verb runs in one process", where="torchrun", fix="run it without torchrun")
        return World.from_environment()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Return the slice of `count` items that this rank handles. The size must divide `count`."""
        per_rank = count // self.size
        return slice(self.rank * per_rank, (self.rank + 1) * per_rank)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks. At size 1 it is the tensor itself, not a copy."""
        if self.size == 1:
            return tensor
        total = tensor.clone()  # all_reduce works in place
        with _lost_process_reported():
            dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Return whether the flag is true on any rank."""
        return float(self.sum(torch.tensor(float(flag), device=self.device))) > 0

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate the tensors of all ranks along the first dimension, in rank order. Their shapes must be equal."""
        if self.size == 1:
            return tensor
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        with _lost_process_reported():
            dist.all_gather(gathered, tensor.contiguous())
        return torch.cat(gathered)

    def barrier(self) -> None:
        if self.size > 1:
            with _lost_process_reported():
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
def _lost_process_reported() -> Iterator[None]:
    """Turn the RuntimeError of a collective into ProcessLost: another process is gone or does not take part."""
    try:
        yield
    except RuntimeError as error:
        # These are RuntimeErrors too, but of this process.
        if isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error):
            raise
        reason = str(error).strip().splitlines()[0][:200]
        raise ProcessLost(
            f"another process of this run is gone or does not respond ({reason})", "torchrun", "continue with --resume"
        ) from error


def generator(*key: int | str) -> torch.Generator:
    """Return a random generator that depends only on its key, such as (seed, "sample", step).

    No generator carries state from step to step, so a resumed run draws the same numbers as an uninterrupted one.
    """
    # Not hash(), which Python randomises for strings in each process.
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def run_concurrently(*jobs: Callable[[], Any]) -> list[Any]:
    """Run jobs that share no state concurrently on a CPU, and return their results in order.

    Each job gets an equal share of torch's threads: two models side by side keep two processors busier than one model
    whose small operations are split between them. With one thread, on a GPU, or inside another job, the jobs run one
    after the other. If a job fails, its error is raised when all have ended; of several, that of the first job.
    """
    threads = torch.get_num_threads()
    in_main_thread = threading.current_thread() is threading.main_thread()
    if min(threads, len(jobs)) == 1 or torch.cuda.is_available() or not in_main_thread:
        return [job() for job in jobs]
    run = partial(_with_threads, max(1, threads // len(jobs)), torch.is_grad_enabled())
    try:
        futures = [_workers().submit(run, job) for job in jobs]
        for future in futures:
            future.exception()  # waits for the job, so that none still runs when an error is raised
        done = [future.result() for future in futures]
    finally:
        torch.set_num_threads(threads)  # the jobs set it for the process: the matrix library has one count for all
    _job_seconds[0] += max(seconds for _, seconds in done)
    return [result for result, _ in done]


def busy_seconds() -> float:
    """Return the processor seconds of this thread, plus those of the longest job in each call of `run_concurrently`.

    On an idle machine they grow as fast as wall-clock time, and unlike it they do not count the load of other programs.
    """
    return time.thread_time() + _job_seconds[0]


_job_seconds = [0.0]
"""processor seconds of the longest job, summed over the calls of `run_concurrently`"""


def _with_threads(threads: int, gradients: bool, job: Callable[[], Any]) -> tuple[Any, float]:
    """Run a job, and return its result and its processor seconds."""
    start = time.thread_time()
    torch.set_num_threads(threads)
    # Gradient mode is a state of the thread, so the job needs that of its caller.
    with torch.set_grad_enabled(gradients):
        return job(), time.thread_time() - start


@cache
def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="keel")
