"""Runs in several processes that find each other as under torchrun. As a program: the runs of one of the processes."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import keel
from keel.errors import Interrupted
from keel.failpoints import VARIABLE, _visits

Step = dict[str, Any]
"""`verb` (a function of keel), its `values`, and what happens: `resume`, `nan` (a loss of the last process, once),
`interrupt` (of the last process, in the second step)."""


def start_processes(count: int, command: Sequence[str]) -> None:
    """Run a command in each process, and wait for all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    source = str(Path(keel.__file__).parents[1])
    shared = {"PYTHONPATH": source, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = []
    for rank in range(count):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        environment = os.environ | shared | place | {"KEEL_COLLECTIVE_SECONDS": "300"}
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        # On a busy machine; alone it takes 20 seconds.
        errors = [process.communicate(timeout=900)[1] for process in started]
        codes = [process.returncode for process in started]
        assert codes == [0] * count, (codes, *(text[-2000:] for text in errors))
    finally:
        for process in started:
            process.kill()


def run_in_processes(count: int, steps: Sequence[Step]) -> None:
    start_processes(count, [sys.executable, __file__, json.dumps(steps)])


def run(steps: Sequence[Step]) -> None:
    for step in steps:
        run_step(**step)


def run_step(
    verb: str, values: dict[str, Any], resume: bool = False, nan: bool = False, interrupt: bool = False
) -> None:
    is_last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    _visits.clear()
    visits = []

    def failpoint(name: str) -> bool:
        visits.append(name)
        if interrupt and is_last and name == "step.update" and visits.count(name) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return False

    requests = {VARIABLE: "update.loss:1=nan"} if nan and is_last else {}
    loops = [mock.patch(f"{loop}.failpoint", failpoint) for loop in ("keel.supervised.loop", "keel.training.trainer")]
    with mock.patch.dict(os.environ, requests), loops[0], loops[1]:
        try:
            getattr(keel, verb)(values, resume=resume)
            assert not interrupt
        except Interrupted:
            assert interrupt
            assert visits.count("step.update") == 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(json.loads(sys.argv[1]))
