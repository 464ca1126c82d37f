"""Keep the rows on which an update went wrong, for `keel doctor` and for people."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from keel.errors import CheckpointError
from keel.run.folder import RunFolder, replace_folder
from keel.run.json_values import finite

MOST = 20
"""More steps than these are not kept: a run that skips bad updates may meet many."""


def keep_rows(
    folder: RunFolder,
    step: int,
    what: str,
    rows: Iterable[Mapping[str, Any]],
    tensors: Mapping[str, Tensor] | None = None,
    rank: str = "",
) -> str:
    """`faults/step-000012/`: fault.json, rows.jsonl and, if there are tensors, batch.safetensors.

    Returns where it is, for a message: nothing that goes wrong here hides what went wrong before.
    """
    if len(list(folder.faults.glob("step-*"))) >= MOST:
        return ""
    target = folder.faults / f"step-{step:06d}{rank}"

    def write(path: Path) -> None:
        (path / "fault.json").write_text(json.dumps({"step": step, "what": what}) + "\n", encoding="utf-8")
        lines = (json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows)
        (path / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
        if tensors:
            save_file(dict(tensors), path / "batch.safetensors")

    try:
        replace_folder(target, write)
    except (CheckpointError, SafetensorError) as error:
        return f" (its batch could not be kept: {error})"
    return f", see {target}"
