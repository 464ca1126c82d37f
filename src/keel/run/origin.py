"""What a run began with: the files it reads, and the machine. If both are the same, a resumed run is bit-identical."""

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from keel import kernels
from keel.errors import CheckpointError, ConfigError
from keel.run.folder import RunFolder, sha256, write_atomic
from keel.terminal import tell


def check_origin(
    folder: RunFolder,
    sources: Iterable[str | tuple[str, str] | None],
    world_size: int,
    resume: bool,
    code: Iterable[str] = (),
) -> None:
    """Write down what a fresh run begins with; compare what a resumed one finds, and say what of the machine differs.

    `sources` are files and folders, or pairs of a name and the fingerprint of what no file holds; names of the hub are
    passed over. Raises ConfigError for one that has changed.
    `code`, files of reward functions, may have been mended: that is said.
    """
    code = list(code)
    now = {"inputs": dict(fingerprints([*sources, *code])), "machine": machine(world_size)}
    if resume and folder.holds_run and folder.began.is_file():
        try:
            before = json.loads(folder.began.read_text(encoding="utf-8"))
            inputs, others = before["inputs"], before["machine"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError("cannot be read", str(folder.began), "remove it to resume unchecked") from error
        changed = [path for path, print_ in now["inputs"].items() if inputs.get(path, print_) != print_]
        lost = [path for path in changed if path not in code]
        if lost:
            raise ConfigError("no longer what the run began with", lost[0], "put it back, or choose another output")
        today = now["machine"]
        differ = [f"{name} was {old}, is {today.get(name)}" for name, old in others.items() if today.get(name) != old]
        differ += [f"{path} has changed" for path in changed]
        if differ:
            tell(f"{'; '.join(differ)}: the run goes on, but not bit for bit")
        return
    write_atomic(folder.began, json.dumps(now, indent=1) + "\n")


def machine(world_size: int) -> Mapping[str, Any]:
    """What the last bits of a sum depend on."""
    return {
        "processes": world_size,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name(),
        "kernels": kernels.available(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "keel": version("keel-rlhf"),
    }


def processor_name() -> str:
    """Its model where the system tells, else its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def fingerprints(sources: Iterable[str | tuple[str, str] | None]) -> Iterable[tuple[str, str]]:
    """The SHA-256 of each file, and of each folder's files with their names; pairs as they are."""
    named: list[str | tuple[str, str]] = [source for source in sources if source]
    for source in dict.fromkeys(named):
        if isinstance(source, tuple):
            yield source
            continue
        path = Path(source)
        if path.is_file():
            yield source, sha256(path)
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            text = "".join(f"{file.relative_to(path)} {sha256(file)}\n" for file in files)
            yield source, hashlib.sha256(text.encode()).hexdigest()
