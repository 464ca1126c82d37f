"""The processes of a run: rank, size, device, reductions and random streams. The same code runs at size 1."""

import atexit
import hashlib
import json
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
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from keel import errors
from keel.errors import ConfigError, KeelError, ProcessLost
from keel.heartbeat import LOST_FIX, Heartbeats

COLLECTIVE_SECONDS = 1800
"""seconds that a process waits for a collective, or for a sign of life; KEEL_COLLECTIVE_SECONDS overrides it"""
CONNECT_TIMEOUT = timedelta(seconds=5)
"""time after which a process asks again where the store is"""


@dataclass(frozen=True)
class World:
    """The processes of a run as one of them sees them."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None  # [copies of the weights, processes per copy]; None: one process, plain tensors

    @staticmethod
    def from_environment(shard: int | None = None) -> "World":
        """Read the variables of torchrun and join its process group. Without them, return a world of one process.

        Args:
            shard: number of processes that share one copy of the weights; None: all.

        Raises ConfigError if `shard` does not divide the number of processes.
        """
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        device = local_device()
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.set_device(device)
        if size > 1 and not dist.is_initialized():
            timeout = timedelta(seconds=_patience())
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                store=_new_store(rank, size, timeout),
                rank=rank,
                world_size=size,
                timeout=timeout,
                device_id=device if cuda else None,
            )
            atexit.register(dist.destroy_process_group)
        if size > 1:
            _heartbeats()
        return World(rank, size, device, _mesh(device.type, size, shard or size) if size > 1 else None)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Return the slice of `count` items that this rank handles. The first ranks handle one more of a remainder."""
        per_rank, remainder = divmod(count, self.size)
        first = self.rank * per_rank + min(self.rank, remainder)
        return slice(first, first + per_rank + (self.rank < remainder))

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks. At size 1 it is the tensor itself, not a copy."""
        if self.size == 1:
            return tensor
        total = tensor.clone()  # all_reduce works in place
        with lost_process_reported(every_error=True):
            dist.all_reduce(total)
        return total

    def max(self, count: int) -> int:
        """Return the largest count of all ranks."""
        return max(self.gather(torch.tensor([count], device=self.device)).tolist())

    def any(self, flag: bool) -> bool:
        """Return whether the flag is true on any rank."""
        return float(self.sum(torch.tensor(float(flag), device=self.device))) > 0

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate the tensors of all ranks along the first dimension, in rank order. Their shapes must be equal."""
        if self.size == 1:
            return tensor
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        with lost_process_reported(every_error=True):
            dist.all_gather(gathered, tensor.contiguous())
        return torch.cat(gathered)

    def gather_values(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order. A value is anything that JSON can hold."""
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value), "utf-8"), dtype=torch.uint8)
        padded = torch.zeros(self.max(len(text)), dtype=torch.uint8, device=self.device)
        padded[: len(text)] = text  # the rest stays 0, which is no character of JSON
        texts = self.gather(padded).view(self.size, -1).cpu()
        return [json.loads(bytes(row.tolist()).rstrip(b"\0")) for row in texts]

    def from_main(self, job: Callable[[], Any]) -> Any:
        """Run `job` on the main process, and return its result, which JSON can hold, on all. So are its errors."""
        return self.gather_values(raise_together(self, job if self.is_main else _nothing))[0]

    def wait_for_all(self) -> None:
        """Wait until all processes are here, for any time, as long as they are alive. A collective must follow.

        It stands before a collective that processes may reach at different times, since collectives have a timeout.
        `raise_together`, `from_main`, `in_turn` and `barrier` include it.
        """
        if self.size > 1:
            with lost_process_reported(every_error=True):
                _heartbeats().wait_for_all()

    def barrier(self) -> None:
        self.wait_for_all()
        if self.size > 1:
            with lost_process_reported(every_error=True):
                dist.barrier()

    def in_turn(self, job: Callable[[], Any]) -> Any:
        """Return the result of `job`, which the processes of a machine run one after the other.

        So only one of them needs the memory that the job needs for a moment. The job must not call another process.
        An error of one process is raised on all.
        """
        if self.size == 1:
            return job()
        self.wait_for_all()
        turns, place = int(os.environ.get("LOCAL_WORLD_SIZE", self.size)), int(os.environ.get("LOCAL_RANK", self.rank))
        results = [raise_together(self, job if turn == place else _nothing) for turn in range(self.max(turns))]
        return results[place]


def _nothing() -> None:
    pass


ALONE = World(0, 1, torch.device("cpu"))
"""A world of this process only, for work that no other process joins"""


def is_main_process() -> bool:
    """Return whether this process is the only one or the first under torchrun."""
    return os.environ.get("RANK", "0") == "0"


def local_device() -> torch.device:
    """Return the device of this process: its GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@cache
def _mesh(device: str, size: int, shard: int) -> DeviceMesh:
    if size % shard:
        raise ConfigError(
            f"{shard} does not divide the {size} processes",
            where="parallel.shard",
            fix=f"set it to one of {', '.join(str(n) for n in range(1, size + 1) if size % n == 0)}",
        )
    return init_device_mesh(device, (size // shard, shard), mesh_dim_names=("replicate", "shard"))


def _new_store(rank: int, size: int, timeout: timedelta) -> Any:
    """Return the store in which the processes meet.

    After a restart, torchrun's store still has the addresses of the processes that have died, and the new ones would
    wait for them. The count of restarts differs between machines. So process 0 opens a store, and publishes its port.
    """
    torchrun, _, _ = next(rendezvous("env://", rank, size, timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # then process 0 has opened it
        return torchrun
    host = os.environ["MASTER_ADDR"]
    tcp_store: Any = dist.TCPStore  # type: ignore[attr-defined]
    if rank == 0:
        store = tcp_store(host, 0, size, is_master=True, timeout=timeout, wait_for_workers=False)
        torchrun.set("keel/port", str(store.port))
        return store
    end = time.monotonic() + timeout.total_seconds()
    while True:
        port = int(torchrun.get("keel/port"))
        try:
            store = tcp_store(host, port, size, is_master=False, timeout=CONNECT_TIMEOUT, wait_for_workers=False)
        except dist.DistError:  # the port of the previous start, whose process 0 is gone
            if time.monotonic() > end:
                raise
        else:
            store.set_timeout(timeout)
            return store


def _patience() -> float:
    return float(os.environ.get("KEEL_COLLECTIVE_SECONDS", COLLECTIVE_SECONDS))


@cache
def _heartbeats() -> Heartbeats:
    """Start the heartbeat of this process, or return it."""
    return Heartbeats(dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size(), _patience())


def raise_together(world: World, job: Callable[[], Any]) -> Any:
    """Return the result of `job`, which every process runs, and which may take much longer on some of them.

    Raises the KeelError of the first process that raises one, on all processes, so that none waits for that process.
    """
    result: Any = None
    error: KeelError | None = None
    try:
        result = job()
    except KeelError as caught:
        error = caught
    world.wait_for_all()
    report = None if error is None else [type(error).__name__, error.what, str(error.where), error.fix]
    first = next(filter(None, world.gather_values(report)), None)
    if first is not None:
        raise error or getattr(errors, first[0])(*first[1:])
    return result


@contextmanager
def lost_process_reported(every_error: bool = False) -> Iterator[None]:
    """Turn the error of a collective into ProcessLost: another process is gone or does not take part.

    Args:
        every_error: the block is nothing but a collective, so that every RuntimeError comes from it. Otherwise only
            those count that name the library of the process group: FSDP calls it during passes of models.
    """
    try:
        yield
    except Exception as error:
        lost = find_lost_process(error, every_error)
        if lost is None:
            raise
        raise lost from error


def find_lost_process(error: BaseException, every_error: bool = False) -> ProcessLost | None:
    """Return the ProcessLost that an error amounts to; None for another error.

    An error during the handling of a collective's error counts too: after a failed collective, FSDP's modules are in no
    state to continue, and fail in other ways.

    Args:
        every_error: every RuntimeError comes from a collective.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, (KeelError, torch.OutOfMemoryError)):
        if isinstance(cause, RuntimeError) and (every_error or _is_collective_error(cause)):
            if "CUDA error" in str(cause):  # of this process
                return None
            reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0][:200]
            return ProcessLost(
                f"another process of this run is gone or does not respond ({reason})", "torchrun", LOST_FIX
            )
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


def _is_collective_error(error: RuntimeError) -> bool:
    text = str(error).lower()
    if "failed to listen" in text:  # the port is in use, which a new start does not change
        return False
    return isinstance(error, dist.DistError) or "gloo" in text


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
    whose small operations are split between them. With one thread, on a GPU, in several processes, or inside another
    job, the jobs run one after the other. If a job fails, its error is raised when all have ended; of several, that of
    the first job.
    """
    threads = torch.get_num_threads()
    in_main_thread = threading.current_thread() is threading.main_thread()
    in_lockstep = dist.is_initialized()  # two threads would call the other processes in an order of chance
    if min(threads, len(jobs)) == 1 or torch.cuda.is_available() or in_lockstep or not in_main_thread:
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
