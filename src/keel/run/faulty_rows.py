"""Keep the rows of a failed or skipped update, for `keel doctor` and for people."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from keel.errors import CheckpointError
from keel.run.folder import RunFolder, replace_folder
from keel.run.json_values import replace_non_finite

MOST = 20
"""Largest number of steps to keep: a run that skips bad updates may have many."""


def keep_rows(
    folder: RunFolder,
    step: int,
    what: str,
    rows: Iterable[Mapping[str, Any]],
    tensors: Mapping[str, Tensor] | None = None,
    rank: str = "",
) -> str:
    """Write `faults/step-000012/` with fault.json, rows.jsonl and, if there are tensors, batch.safetensors.

    Returns text to append to an error message: where the rows are, or why they could not be written. It raises no
    error itself, which would hide the error of the update.
    """
    if len(list(folder.faults.glob("step-*"))) >= MOST:
        return ""
    target = folder.faults / f"step-{step:06d}{rank}"

    def write(path: Path) -> None:
        (path / "fault.json").write_text(json.dumps({"step": step, "what": what}) + "\n", encoding="utf-8")
        lines = (json.dumps(replace_non_finite(row), ensure_ascii=False) + "\n" for row in rows)
        (path / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
        if tensors:
            save_file(dict(tensors), path / "batch.safetensors")

    try:
        replace_folder(target, write)
    except (CheckpointError, SafetensorError) as error:
        return f" (its batch could not be kept: {error})"
    return f", see {target}"
