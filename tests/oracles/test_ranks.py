"""Two processes: two ranks with answers of unequal length take the step that one rank would take."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from keel.data.batches import select_rows

from .system import gradients_of, in_double, setup_of, uneven


def of_two_ranks(model: Path, folder: Path, rows: tuple[str, str], masked: str) -> list[torch.Tensor]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    script = str(Path(__file__).with_name("rank.py"))
    path = os.pathsep.join(entry for entry in sys.path if entry)
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(model), str(folder / str(rank)), rows[rank], masked],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [load_file(folder / str(rank))["gradient"] for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "masked"),
    [(("0245", "1367"), ""), (("0123", "4567"), "4567")],
    ids=["short answers here, long there", "one rank has nothing to count"],
)
def test_two_ranks_take_the_step_of_one(tiny_policy: Path, tmp_path: Path, rows: tuple[str, str], masked: str) -> None:
    setup = in_double(setup_of(tiny_policy))
    counted = [row for row in range(8) if str(row) not in masked]
    updater = replace(setup.updater, schedule=replace(setup.updater.schedule, minibatch_size=len(counted)))
    (alone,) = gradients_of(updater, select_rows(uneven(setup), counted))
    for gradient in of_two_ranks(tiny_policy, tmp_path, rows, masked):
        assert alone.norm() > 1e-3
        assert (gradient - alone).norm() < 1e-10 * alone.norm()
