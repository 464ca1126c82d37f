"""One of two processes that share an optimizer step: `RANK=0 WORLD_SIZE=2 ... python rank.py MODEL OUT ROWS [MASKED]`.

Writes the gradient that its optimizer got.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from system import gradients_of, in_double, setup_of, uneven

from keel.data.batches import select_rows
from keel.world import World


def main(model: str, out: str, rows: str, masked: str = "") -> None:
    torch.set_num_threads(1)
    setup = in_double(setup_of(Path(model), algorithm_microbatch_tokens=20))
    batch = uneven(setup)
    mask = batch.response_mask.clone()
    mask[[int(row) for row in masked]] = False
    batch = select_rows(replace(batch, response_mask=mask), [int(row) for row in rows])
    (gradient,) = gradients_of(replace(setup.updater, world=World.from_environment()), batch)
    save_file({"gradient": gradient}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
