"""The private folder of an engine: its socket, and the weights that the trainer writes for it."""

import fcntl
import json
import os
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from keel.errors import EngineError
from keel.models.adapters import merged_copy
from keel.models.heads import unwrap_model
from keel.rollout.vllm.supervisor import TRACKER, TRACKER_SECONDS

PREFIX = "keel-engine-"
VARIABLE = "KEEL_ENGINE_FOLDER"
"""Environment variable of every process of an engine. Leftover processes are recognised by it."""
IN_MEMORY = Path("/dev/shm")
ONE_FILE = "1000GB"  # vLLM reads every file of a folder without an index


class EngineFolder:
    """A folder that only its owner can read, in memory where the system has a folder there.

    A lock on it lasts as long as this process, so that another run can tell a folder in use from one that was left.
    """

    def __init__(self) -> None:
        sweep_folders()
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base_folder()))  # mode 0700
        self._lock = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._turn = 0

    @property
    def socket(self) -> Path:
        return self.path / "socket"

    def write_model(self, model: Any, tokenizer: PreTrainedTokenizerBase | None = None, tied: bool = True) -> Path:
        """Write a model folder, with any adapter merged, and return it. The one before the last is replaced.

        Args:
            tokenizer: written too, if given.
            tied: False writes a tied output matrix as a matrix of its own.

        Raises EngineError if the disk is full.
        """
        self._turn = 1 - self._turn
        target = self.path / f"weights-{self._turn}"
        try:
            shutil.rmtree(target, ignore_errors=True)
            merged: Any = merged_copy(model)
            merged.save_pretrained(target, max_shard_size=ONE_FILE)
            if not tied and merged.config.get_text_config().tie_word_embeddings:
                write_untied_head(merged, target)
            if tokenizer is not None:
                tokenizer.save_pretrained(target)
        except OSError as error:
            raise EngineError(
                f"the weights cannot be written for the engine: {error.strerror or error}",
                str(self.path),
                "free memory in this folder; it holds the policy twice",
            ) from error
        return target

    def delete(self) -> None:
        """End every process that was started in the folder, and delete the folder."""
        end_processes(self.path)
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def base_folder() -> Path:
    usable = IN_MEMORY.is_dir() and os.access(IN_MEMORY, os.W_OK)
    return IN_MEMORY if usable else Path(tempfile.gettempdir())


def write_untied_head(model: Any, folder: Path) -> None:
    """Add the output matrix of a model with tied embeddings to its folder, as a second file with an index.

    vLLM on a CPU does not replace a tied output matrix when it loads new weights.
    """
    head = unwrap_model(model).get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head) + ".weight"
    body, added = (folder / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    (folder / "model.safetensors").rename(body)
    save_file({name: head.weight.detach().clone()}, added, metadata={"format": "pt"})
    with safe_open(body, "pt") as file:
        places = dict.fromkeys(file.keys(), body.name) | {name: added.name}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for section in (config, config.get("text_config")):
        if isinstance(section, dict):
            section["tie_word_embeddings"] = False
    path.write_text(json.dumps(config, indent=2))


def sweep_folders() -> None:
    """Delete the folders of engines whose trainer is gone, and end their processes."""
    for path in base_folder().glob(f"{PREFIX}*"):
        with suppress(OSError):  # of another user, or just deleted
            if path.stat().st_uid != os.getuid() or not (path / "lock").exists():
                continue
            handle = os.open(path / "lock", os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if the trainer lives
                end_processes(path)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(handle)


def end_processes(folder: Path) -> None:
    """End every process of an engine (Linux).

    First those that use shared memory: Python's process for it then deletes what they have left, and ends by itself.
    """
    for number, is_tracker in engine_processes(folder).items():
        if not is_tracker:
            with suppress(OSError):
                os.kill(number, signal.SIGKILL)
    deadline = time.monotonic() + TRACKER_SECONDS
    while (left := engine_processes(folder)) and time.monotonic() < deadline:
        time.sleep(TRACKER_SECONDS / 20)
    for number in left:
        with suppress(OSError):
            os.kill(number, signal.SIGKILL)


def engine_processes(folder: Path) -> dict[int, bool]:
    """Find the processes of an engine by the environment that they were started with.

    Returns for each whether it is the process that deletes shared memory.
    """
    entry, processes = f"{VARIABLE}={folder}".encode(), {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # of another user, or gone
            is_zombie = (path / "stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z"
            if entry in (path / "environ").read_bytes().split(b"\0") and not is_zombie:
                processes[int(path.name)] = TRACKER in (path / "cmdline").read_bytes()
    return processes
