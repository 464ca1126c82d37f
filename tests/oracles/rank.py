"""One of several processes that share an optimizer step: `RANK=0 WORLD_SIZE=2 ... python rank.py MODEL OUT COUNTED`.

Writes the gradient that its optimizer got from the batch `uneven`, of which only the rows in COUNTED count.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from system import counted_only, gradients_of, in_double, setup_of, uneven

from keel.world import World


def main(model: str, out: str, counted: str) -> None:
    torch.set_num_threads(1)
    alone = in_double(setup_of(Path(model)))
    batch = counted_only(uneven(alone), counted)
    setup = in_double(setup_of(Path(model), world=World.from_environment(), algorithm_microbatch_tokens=20))
    setup.actor_critic.value_units = alone.actor_critic.value_units
    (gradient,) = gradients_of(setup.updater, batch)
    save_file({"gradient": gradient}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
