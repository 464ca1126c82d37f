"""Tensors in safetensors files, each of which holds the rows of one process.

The header of a file has the first row of each of its tensors. So any number of processes can read what another number
wrote, and each reads only its rows.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from keel.errors import CheckpointError
from keel.shards import Rows, local_tensor

FIRST_ROWS = "first_rows"
OTHER_MODEL = "resume with the model and the LoRA settings of the start of the run"


def write_rows(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the rows of the tensors that this process holds, except copies of another's. Raises CheckpointError."""
    held = {name: Rows.of(tensor.detach()) for name, tensor in tensors.items()}
    held = {name: rows for name, rows in held.items() if not rows.is_copy and (rows.values.numel() or not rows.first)}
    first_rows = {name: rows.first for name, rows in held.items()}
    with _storage_errors(path):
        values = {name: rows.values.contiguous() for name, rows in held.items()}
        save_file(values, path, metadata={FIRST_ROWS: json.dumps(first_rows, sort_keys=True)})


@dataclass(frozen=True)
class SavedTensors:
    """The tensors of a checkpoint under one name, whatever number of processes wrote them."""

    folder: Path
    parts: Mapping[str, list[tuple[Any, int, list[int]]]]  # name -> open file, first row and shape of each part

    @classmethod
    def open(cls, folder: Path, name: str) -> "SavedTensors":
        """Open the files of a set of tensors. Raises CheckpointError."""
        parts: dict[str, list[tuple[Any, int, list[int]]]] = {}
        paths = [*folder.glob(f"{name}.safetensors"), *sorted(folder.glob(f"{name}-[0-9]*.safetensors"))]
        if not paths:
            raise CheckpointError(f"the checkpoint has no {name}", where=str(folder))
        for path in paths:
            with _storage_errors(path):
                file = safe_open(path, "pt")
                first_rows = json.loads((file.metadata() or {}).get(FIRST_ROWS, "{}"))
                for key in file.keys():  # noqa: SIM118
                    parts.setdefault(key, []).append((file, first_rows.get(key, 0), file.get_slice(key).get_shape()))
        return cls(folder, parts)

    @property
    def names(self) -> set[str]:
        return set(self.parts)

    def dtype(self, name: str) -> torch.dtype:
        """Return the number format in which a tensor was saved."""
        file, *_ = self.parts[name][0]
        dtype: torch.dtype = file.get_slice(name)[:0].dtype if self.parts[name][0][2] else file.get_tensor(name).dtype
        return dtype

    def is_scalar(self, name: str) -> bool:
        return not self.parts[name][0][2]

    @torch.no_grad()
    def copy_to(self, name: str, target: Tensor) -> None:
        """Copy the rows that this process holds of `target` from the files. Raises CheckpointError for other shapes."""
        rows = Rows.of(target.detach())
        missing = len(rows.values) if rows.values.dim() else 1
        for file, first, shape in self.parts.get(name, []):
            if shape[1:] != list(target.shape[1:]) or len(shape) != target.dim():
                break
            if not shape:
                rows.values.copy_(file.get_tensor(name))
                return
            low, high = max(first, rows.first), min(first + shape[0], rows.first + len(rows.values))
            if low < high:
                part = file.get_slice(name)[low - first : high - first]
                rows.values[low - rows.first : high - rows.first].copy_(part)
                missing -= high - low
        if missing or self._num_rows(name) != target.shape[0]:
            raise CheckpointError(
                f"{name} has another shape than in this model, or rows of it are missing",
                where=str(self.folder),
                fix=OTHER_MODEL,
            )

    def _num_rows(self, name: str) -> int:
        return max((first + shape[0] for _, first, shape in self.parts.get(name, [])), default=0)


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:  # safetensors reports a full disk this way
        raise CheckpointError(str(error), str(path), "free or repair the storage") from error


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the moments and counters of the optimizer as `INDEX.NAME` tensors.

    Learning rates and parameter groups are not saved: they come from the settings.
    """
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, moments in optimizer.state_dict()["state"].items()
        for name, value in moments.items()
    }


def load_optimizer_tensors(optimizer: Optimizer, saved: SavedTensors) -> None:
    """Load the result of `optimizer_tensors`. Raises CheckpointError if the parameters have other shapes."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key in sorted(saved.names):
        index, name = key.split(".", 1)
        if int(index) >= len(parameters):
            raise CheckpointError(f"the optimizer state {key} fits no parameter of this model", fix=OTHER_MODEL)
        parameter = parameters[int(index)]
        is_counter = saved.is_scalar(key)
        empty = torch.zeros((), device=local_tensor(parameter).device) if is_counter else torch.zeros_like(parameter)
        saved.copy_to(key, empty)
        optimizer.state[parameter][name] = empty
