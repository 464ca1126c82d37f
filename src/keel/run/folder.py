"""The run folder: the paths of all files of a run, its lock, and functions that write files atomically."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import yaml

from keel.errors import CheckpointError, ConfigError, Halted
from keel.failpoints import failpoint
from keel.files import read_regular
from keel.run.lock import read_lock, take_lock
from keel.run.saved_settings import load_settings
from keel.terminal import print_line

# Settings that a resumed run may change: none of them affects the steps already done.
FREE_ON_RESUME = (
    *("output", "steps", "epochs", "checkpoint", "log", "evaluate", "microbatch_tokens", "gate", "doctor"),
    "parallel",
)

YAML_ERRORS = (ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)  # errors of YAML constructors


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn errors of the file system into a CheckpointError with the path and the system's reason."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        place = error.filename or path
        raise CheckpointError(
            error.strerror or str(error), where=str(place), fix="free or repair the storage"
        ) from error


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file atomically: a reader sees the old content or the new one. Raises CheckpointError."""
    partial = path.with_name(f".{path.name}.tmp")
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def write_final_metrics(folder: "RunFolder", metrics: Mapping[str, float]) -> None:
    """Write the metrics of a finished run to figures.json. Raises CheckpointError."""
    write_atomic(folder.path / "figures.json", json.dumps(metrics, indent=1) + "\n")


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Replace a folder by one that `write` fills. A reader never sees an incomplete folder. Raises CheckpointError."""
    partial = target.with_name(f"{target.name}.tmp")
    with storage(target):
        failpoint("result.begin")
        delete_path(partial)
        partial.mkdir(parents=True)
        write(partial)
        readable = partial.stat().st_mode & 0o666  # the user's default mode; some libraries write private files
        for path in (*partial.rglob("*"), partial):
            if path.is_file():
                path.chmod(readable)
            sync(path)
        failpoint("result.visible")
        delete_path(target)
        partial.rename(target)
        sync(target.parent)
        failpoint("result.done")


def delete_path(path: Path) -> None:
    """Delete a file or folder if it exists. Of a symbolic link only the link is deleted. Raises OSError."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def sync(path: Path) -> None:
    """Flush a file or folder to disk, so that it survives a power failure."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a directory
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RunFolder:
    """The paths inside a run folder.

    `RunFolder(path)` only names them. `RunFolder.open` locks the folder for writing.
    """

    def __init__(self, path: str | Path) -> None:
        self._lock: int | None = None
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.began = self.path / "began.json"
        self.ended = self.path / "ended.json"
        self.metrics = self.path / "metrics.jsonl"
        self.rollouts = self.path / "rollouts.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.faults = self.path / "faults"
        self.responses = self.path / "responses"
        self.tensorboard = self.path / "tensorboard"
        self.policy = self.path / "policy"
        self.critic = self.path / "critic"
        self.model = self.path / "model"
        self.members = self.path / "members"

    @classmethod
    def open(cls, path: str | Path, settings: Mapping[str, Any], resume: bool = False) -> Self:
        """Lock the folder and save the settings in it.

        To resume a run that never started is to start it.

        Args:
            settings: plain values, as of `model_dump(mode="json")`.

        Raises ConfigError for a folder that cannot be written, is in use, holds a run without `resume`, or holds a run
        with other settings.
        """
        folder = cls(path)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            folder._lock = take_lock(folder.path)
        except OSError as error:
            raise ConfigError(f"cannot write here: {error.strerror}", str(path), "choose another output") from error
        if folder.holds_run:
            folder._check_resumable(settings, resume)
        elif resume:
            print_line(f"nothing to resume in {folder.path}: starting a new run")
        folder.ended.unlink(missing_ok=True)
        write_atomic(folder.config, yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))
        return folder

    @property
    def holds_run(self) -> bool:
        """Whether the folder has metrics, checkpoints or a result.

        Settings alone are no run: a start that failed before its first step may be repeated.
        """
        return self.holds_result or any(_has_content(path) for path in (self.metrics, self.checkpoints))

    @property
    def holds_result(self) -> bool:
        """Whether the folder has a trained model, which a run writes last."""
        return any(_has_content(path) for path in (self.policy, self.model, self.members))

    @contextmanager
    def outcome_recorded(self) -> Iterator[Self]:
        """Record how the run ends: with the block, by an error in it, or by a stop."""
        try:
            yield self
        except BaseException as error:
            failed = not isinstance(error, KeyboardInterrupt | Halted)
            self._record_end("failed" if failed else "stopped", f"{type(error).__name__}: {error}")
            raise
        self._record_end("finished", "")

    def _record_end(self, outcome: str, what: str) -> None:
        with suppress(CheckpointError):  # the error of the run matters more, and often is about the same disk
            write_atomic(self.ended, json.dumps({"standing": outcome, "what": what}) + "\n")

    def settings(self) -> dict[str, Any]:
        """Read the settings that the run was started with. Raises CheckpointError when they cannot be read."""
        try:
            saved = load_settings(read_regular(self.config))
        except (OSError, yaml.YAMLError, *YAML_ERRORS) as error:
            raise CheckpointError("the run's settings cannot be read", where=str(self.config)) from error
        if not isinstance(saved, dict):
            raise CheckpointError("no settings in this file", where=str(self.config))
        return saved

    def read_lock(self) -> str | None:
        """Return the text of the lock file, which names the trainer that has the folder. None without one."""
        return read_lock(self.path)

    def close(self) -> None:
        """Release the lock. The end of a `with` block, of this object or of the process releases it as well."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _check_resumable(self, settings: Mapping[str, Any], resume: bool) -> None:
        if not resume:
            raise ConfigError(
                f"run folder {self.path} already holds a run", fix="add --resume, or choose another output"
            )
        changed = changed_settings(self.settings(), settings)
        if changed:
            raise ConfigError(
                f"cannot resume with other settings: {'; '.join(changed)}",
                where=str(self.path),
                fix=f"use the settings of {self.config}, or choose another output",
            )


def changed_settings(saved: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return a line `NAME was OLD, is NEW` for each setting that differs and that a resumed run must keep."""
    old, current = dict(_flat(saved)), dict(_flat(new))
    return [
        f"{name} was {old.get(name)!r}, is {current.get(name)!r}"
        for name in sorted(old.keys() | current.keys())
        if old.get(name) != current.get(name) and not _may_change(name)
    ]


def _may_change(name: str) -> bool:
    parts = name.split(".")
    return parts[0] in FREE_ON_RESUME or parts[-1] in FREE_ON_RESUME


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _has_content(path: Path) -> bool:
    if path.is_dir():
        return any(path.iterdir())
    return path.is_file() and path.stat().st_size > 0
