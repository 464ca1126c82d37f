"""Atomic checkpoints: written to a temporary folder, verified by a manifest, made visible by one rename.

`checkpoints/step-000020/` contains `state.json`, NAME.safetensors for each named set of tensors (of several processes
NAME-00000.safetensors and so on, with the rows that each holds), a Hugging Face folder for each model, and
`manifest.json` (size and SHA-256 of every other file), which is written last. There is no pickle.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from keel.errors import CheckpointError, ConfigError
from keel.failpoints import failpoint
from keel.files import read_regular
from keel.run.folder import RunFolder, delete_path, sha256, storage, sync
from keel.run.metrics_log import sync_to_disk
from keel.run.saved_tensors import SavedTensors, write_local_rows
from keel.world import ALONE, World, raise_together

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

    def tensors(self, name: str) -> "SavedTensors":
        """Open the tensors saved under `name`. Raises CheckpointError."""
        return SavedTensors.open(self.path, name)

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
    world: World = ALONE,
) -> Path:
    """Save a checkpoint of `step`, then delete all but the newest `keep` (0 deletes none). Raises CheckpointError.

    Nothing is deleted before the new checkpoint is in place, so that an intact one exists at any time. A valid
    checkpoint of the same step is kept: a run is a function of its settings, so it has the same content.

    Args:
        state, models: only the main process writes them.
        world: processes that save together; each writes the rows of the tensors that it holds.
    """
    target = folder.checkpoints / f"step-{step:06d}"
    partial = target.with_suffix(".tmp")
    if world.from_main(lambda: _fault(target) is None):
        return target
    try:
        world.from_main(lambda: _prepare(folder, partial))
        written = raise_together(world, lambda: _write_tensors(partial, tensors, world))
        files = {name: entry for share in world.gather_values(written) for name, entry in share.items()}
        world.from_main(lambda: _complete(folder, step, partial, target, files, state, models, keep))
    finally:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)  # after a failure, free the space; after a success, it is gone
    return target


def _prepare(folder: RunFolder, partial: Path) -> None:
    with storage(partial):
        failpoint("save.begin")
        delete_path(partial)
        partial.mkdir(parents=True)
        for log in (folder.metrics, folder.rollouts):
            sync_to_disk(log)


def _write_tensors(
    partial: Path, tensors: Mapping[str, Mapping[str, Tensor]], world: World
) -> dict[str, dict[str, Any]]:
    """Write this process's rows of all tensors. Return size and SHA-256 of each file."""
    files = {}
    with storage(partial):
        for name, named in tensors.items():
            path = partial / (f"{name}.safetensors" if world.size == 1 else f"{name}-{world.rank:05d}.safetensors")
            write_local_rows(path, named)
            files[path.name] = _describe(path)
            failpoint("save.content")
    return files


def _complete(
    folder: RunFolder,
    step: int,
    partial: Path,
    target: Path,
    files: dict[str, Any],
    state: Mapping[str, Any],
    models: Mapping[str, Callable[[Path], None]],
    keep: int,
) -> None:
    """Write what the main process alone holds, then the manifest, and make the checkpoint visible."""
    absent = next((name for name in files if not (partial / name).is_file()), None)
    if absent is not None:
        raise CheckpointError(
            f"the file {absent} of another process is not here: the machines do not share this folder",
            str(partial),
            "name an output on a disk that all machines share",
        )
    with storage(partial):
        _write_content(partial, state, models)
        failpoint("save.manifest")
        _write_manifest(partial, step, files)
        failpoint("save.visible")
        _make_visible(partial, target)
        failpoint("save.old")
        _delete_old(folder, step, keep)
        failpoint("save.done")


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


def _write_content(folder: Path, state: Mapping[str, Any], models: Mapping[str, Callable[[Path], None]]) -> None:
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    failpoint("save.content")
    for name, write in models.items():
        (folder / name).mkdir()
        write(folder / name)
        failpoint("save.content")


def _write_manifest(folder: Path, step: int, known: Mapping[str, Any]) -> None:
    """Write size and SHA-256 of every file.

    Args:
        known: those of the files whose writers have reported them.
    """
    files = {name: known.get(name) or _describe(path) for name, path in _files(folder)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1), encoding="utf-8")
    sync(manifest)
    for inner in (path for path in folder.rglob("*") if path.is_dir()):
        sync(inner)
    sync(folder)


def _describe(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file that is safely on the disk."""
    sync(path)
    return {"size": path.stat().st_size, "sha256": sha256(path)}


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
