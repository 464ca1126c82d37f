"""The reference's log-probabilities of a run's responses: computed once, kept in the run folder, read back later."""

import hashlib
from collections.abc import Callable, Mapping

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from keel.run.folder import RunFolder, write_atomic

FILE = "reference.safetensors"


def kept_reference(folder: RunFolder, ask: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors that `ask` gave when the run began, on the CPU. Raises CheckpointError when they cannot be kept.

    A resumed run has the data and the start weights of its beginning (`check_origin`), so a file that is gone or
    damaged is no loss: they are asked for again, and differ by rounding at most.
    """
    kept = read_reference_logprobs(folder) if folder.holds_run else None
    if kept is None:
        kept = {name: values.cpu() for name, values in ask().items()}
        write_atomic(folder.path / FILE, save(kept, {"sha256": hash_tensors(kept)}))
    return kept


def read_reference_logprobs(folder: RunFolder) -> dict[str, Tensor] | None:
    """None when there is no file, or one that is not what was written."""
    try:
        with safe_open(folder.path / FILE, framework="pt") as file:
            kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            return kept if (file.metadata() or {}).get("sha256") == hash_tensors(kept) else None
    except (OSError, SafetensorError):
        return None


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    content = b"".join(name.encode() + tensors[name].numpy().tobytes() for name in sorted(tensors))
    return hashlib.sha256(content).hexdigest()
