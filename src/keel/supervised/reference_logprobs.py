"""Log-probabilities of the reference: computed at the start of a run, and kept in the run folder for its resumption."""

import hashlib
from collections.abc import Callable, Mapping

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from keel.run.folder import RunFolder, write_atomic
from keel.world import World

FILE = "reference.safetensors"


def load_or_compute_reference(
    folder: RunFolder, compute: Callable[[], dict[str, Tensor]], world: World
) -> dict[str, Tensor]:
    """Return the tensors that `compute` returned at the start of the run, on the CPU. Every process must call it.

    They are computed again if their file is missing or damaged. A resumed run has the same data and initial weights
    (`check_origin`), so they differ by rounding at most. Raises CheckpointError when they cannot be written.
    """
    kept = read_reference_logprobs(folder) if folder.holds_run else None
    if world.any(kept is None) or kept is None:  # all processes compute, or none
        computed = {name: values.cpu() for name, values in compute().items()}
        world.from_main(lambda: write_atomic(folder.path / FILE, save(computed, {"sha256": hash_tensors(computed)})))
        return computed
    return kept


def read_reference_logprobs(folder: RunFolder) -> dict[str, Tensor] | None:
    """Read the tensors; None if the file is missing or its hash is wrong."""
    try:
        with safe_open(folder.path / FILE, framework="pt") as file:
            kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            return kept if (file.metadata() or {}).get("sha256") == hash_tensors(kept) else None
    except (OSError, SafetensorError):
        return None


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    content = b"".join(name.encode() + tensors[name].numpy().tobytes() for name in sorted(tensors))
    return hashlib.sha256(content).hexdigest()
