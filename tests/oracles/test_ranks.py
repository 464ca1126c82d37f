"""Ranks that share the rows of a step by tokens, and the weights, take the step that one rank would take."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .system import counted_only, gradients_of, in_double, setup_of, uneven


def of_ranks(count: int, model: Path, folder: Path, counted: str) -> list[torch.Tensor]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "KEEL_COLLECTIVE_SECONDS": "30",
    }
    script = str(Path(__file__).with_name("rank.py"))
    path = os.pathsep.join(entry for entry in sys.path if entry)
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(model), str(folder / str(rank)), counted],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [load_file(folder / str(rank))["gradient"] for rank in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "counted"), [(2, "01234567"), (2, "6")], ids=["micro-batches of both", "a rank without a row"]
)
def test_ranks_take_the_step_of_one(tiny_policy: Path, tmp_path: Path, count: int, counted: str) -> None:
    setup = in_double(setup_of(tiny_policy))
    (alone,) = gradients_of(setup.updater, counted_only(uneven(setup), counted))
    for gradient in of_ranks(count, tiny_policy, tmp_path, counted):
        assert alone.norm() > 1e-3
        assert (gradient - alone).norm() < 1e-10 * alone.norm()
