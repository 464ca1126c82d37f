"""Atomic checkpoints: written to a temporary folder, verified by a manifest, made visible by one rename.

`checkpoints/step-000020/` contains `state.json`, NAME.safetensors for each named set of tensors, a Hugging Face folder
for each model, and `manifest.json` (size and SHA-256 of every other file), which is written last. There is no pickle.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from keel.errors import CheckpointError, ConfigError
from keel.failpoints import failpoint
from keel.files import read_regular
from keel.run.folder import RunFolder, delete_path, sha256, storage, sync
from keel.run.metrics_log import sync_to_disk

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    path: Path
    step: int
    state: dict[str, Any]
    ignored: tuple[str, ...] = ()  # newer checkpoints that cannot be used, each with the reason

    def __str__(self) -> str:
        """The line that is printed when a run is resumed."""
        return f"continuing from step {self.step}" + "".join(f"; ignored {each}" for each in self.ignored)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Load the tensors saved under `name` to the CPU. Raises CheckpointError."""
        path = self.path / f"{name}.safetensors"
        if not path.is_file():
            raise CheckpointError(f"the checkpoint has no {name}", where=str(self.path))
        return load_file(path)

    def folder(self, name: str) -> Path:
        """Return the Hugging Face folder of the model saved under `name`. Raises CheckpointError."""
        path = self.path / name
        if not path.is_dir():
            raise CheckpointError(f"the checkpoint has no {name}", where=str(self.path))
        return path


def save_checkpoint(
    folder: RunFolder,
    step: int,
    state: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    models: Mapping[str, Callable[[Path], None]],
    keep: int = 2,
) -> Path:
    """Save a checkpoint of `step`, then delete all but the newest `keep` (0 deletes none). Raises CheckpointError.

    Nothing is deleted before the new checkpoint is in place, so that an intact one exists at any time. A valid
    checkpoint of the same step is kept: a run is a function of its settings, so it has the same content.
    """
    target = folder.checkpoints / f"step-{step:06d}"
    partial = target.with_suffix(".tmp")
    if _fault(target) is None:
        return target
    try:
        with storage(partial):
            failpoint("save.begin")
            delete_path(partial)
            partial.mkdir(parents=True)
            for log in (folder.metrics, folder.rollouts):
                sync_to_disk(log)
            _write_content(partial, state, tensors, models)
            failpoint("save.manifest")
            _write_manifest(partial, step)
            failpoint("save.visible")
            _make_visible(partial, target)
            failpoint("save.old")
            _delete_old(folder, step, keep)
            failpoint("save.done")
    except SafetensorError as error:  # safetensors reports a full disk this way
        raise CheckpointError(str(error), str(partial), "free or repair the storage") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # after a failure, free the space; after a success, it is gone
    return target


def latest_checkpoint(folder: RunFolder) -> Checkpoint | None:
    """Return the newest checkpoint that matches its manifest, or None if none was ever saved.

    Its `ignored` names newer ones that are damaged or unfinished. Raises CheckpointError when all are damaged.
    """
    ignored = [f"{path.name}: unfinished" for path in sorted(folder.checkpoints.glob("step-*.tmp"))]
    damaged: list[str] = []
    for path in reversed(_saved(folder)):
        fault = _fault(path)
        if fault is None:
            state = json.loads(read_regular(path / "state.json"))
            return Checkpoint(path, _step_of(path), state, tuple(ignored + damaged))
        damaged.append(f"{path.name}: {fault}")
    if damaged:
        raise CheckpointError(
            f"no checkpoint can be used ({'; '.join(damaged)})",
            str(folder.checkpoints),
            "start a new run in another output",
        )
    return None


def checkpoint_to_resume(folder: RunFolder, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the checkpoint that a resumed run continues from, or None if it starts again from step 0.

    Args:
        say: print a line that reports which.

    Raises CheckpointError when all are damaged, ConfigError for a finished run without checkpoints.
    """
    checkpoint = latest_checkpoint(folder)
    if checkpoint is not None:
        say(str(checkpoint))
    elif folder.holds_result:
        raise ConfigError(
            "the run is finished and has no checkpoints to resume from", str(folder.path), "choose another output"
        )
    elif folder.holds_run:
        say(f"no checkpoint in {folder.path}: starting again from step 0")
    return checkpoint


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the moments and counters of the optimizer as `INDEX.NAME` tensors.

    Learning rates and parameter groups are not saved: they come from the settings.
    """
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, moments in optimizer.state_dict()["state"].items()
        for name, value in moments.items()
    }


def load_optimizer_tensors(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load the result of `optimizer_tensors`. Raises CheckpointError if the parameters have other shapes."""
    shapes = [tuple(p.shape) for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        if int(index) >= len(shapes) or (value.dim() and tuple(value.shape) != shapes[int(index)]):
            raise CheckpointError(
                f"the optimizer state {key} fits no parameter of this model",
                fix="resume with the model and the LoRA settings of the start of the run",
            )
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _write_content(
    folder: Path,
    state: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    models: Mapping[str, Callable[[Path], None]],
) -> None:
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    failpoint("save.content")
    for name, named in tensors.items():
        save_file({key: value.detach().contiguous() for key, value in named.items()}, folder / f"{name}.safetensors")
        failpoint("save.content")
    for name, write in models.items():
        (folder / name).mkdir()
        write(folder / name)
        failpoint("save.content")


def _write_manifest(folder: Path, step: int) -> None:
    files = {name: {"size": path.stat().st_size, "sha256": sha256(path)} for name, path in _files(folder)}
    for _, path in _files(folder):
        sync(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1), encoding="utf-8")
    sync(manifest)
    for inner in (path for path in folder.rglob("*") if path.is_dir()):
        sync(inner)
    sync(folder)


def _make_visible(partial: Path, target: Path) -> None:
    if target.exists() or target.is_symlink():  # a damaged checkpoint: `save_checkpoint` returns early for a valid one
        delete_path(target)
    partial.rename(target)
    sync(target.parent)


def _delete_old(folder: RunFolder, step: int, keep: int) -> None:
    # Checkpoints of later steps are damaged, or the run would have resumed from them. Keep them for inspection.
    up_to_step = [path for path in _saved(folder) if _step_of(path) <= step]
    for path in up_to_step[:-keep] if keep else []:
        delete_path(path)


def _fault(folder: Path) -> str | None:
    """Return why the checkpoint cannot be used; None if every file matches the manifest."""
    try:
        manifest = json.loads(read_regular(folder / MANIFEST))
        if manifest["format"] != FORMAT or manifest["step"] != _step_of(folder):
            return f"{MANIFEST} is of another format or step"
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except OSError as error:
        return f"{MANIFEST}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    present = dict(_files(folder))
    present.pop(MANIFEST)
    different = sorted(expected.keys() ^ present.keys())
    if different:
        return f"{different[0]} is {'missing' if different[0] in expected else 'not in the manifest'}"
    for name, path in present.items():
        if (path.stat().st_size, sha256(path)) != expected[name]:
            return f"{name} is damaged"
    return None


def _saved(folder: RunFolder) -> list[Path]:
    """Return the folders of all saved checkpoints, oldest first."""
    paths = [path for path in folder.checkpoints.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(paths, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path
