"""The origin of a run: its input files and the machine. With the same origin, a resumed run is bit-identical."""

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
from keel.terminal import print_line


def check_origin(
    folder: RunFolder,
    sources: Iterable[str | tuple[str, str] | None],
    world_size: int,
    resume: bool,
    code: Iterable[str] = (),
) -> None:
    """Write the origin of a new run, or compare that of a resumed run with the current state.

    A different machine or different code is only reported.

    Args:
        sources: files and folders, or (name, fingerprint) for data that is not in a file. Hub ids are skipped.
        code: files of reward functions, which may have been fixed in the meantime.

    Raises ConfigError for a source that has changed, CheckpointError if the origin cannot be read.
    """
    code = list(code)
    now = {"inputs": dict(fingerprints([*sources, *code])), "machine": machine(world_size)}
    if resume and folder.holds_run and folder.began.is_file():
        try:
            saved = json.loads(folder.began.read_text(encoding="utf-8"))
            saved_inputs, saved_machine = saved["inputs"], saved["machine"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                "cannot be read", str(folder.began), "remove the file to resume without this check"
            ) from error
        changed = [path for path, digest in now["inputs"].items() if saved_inputs.get(path, digest) != digest]
        refused = [path for path in changed if path not in code]
        if refused:
            raise ConfigError("has changed since the run began", refused[0], "restore it, or choose another output")
        current = now["machine"]
        differences = [
            f"{name} was {old}, is {current.get(name)}"
            for name, old in saved_machine.items()
            if current.get(name) != old
        ]
        differences += [f"{path} has changed" for path in changed]
        if differences:
            print_line(f"{'; '.join(differences)}: the run continues, but will not be bit-identical")
        return
    write_atomic(folder.began, json.dumps(now, indent=1) + "\n")


def machine(world_size: int) -> Mapping[str, Any]:
    """Return everything that the last bits of a sum depend on."""
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
    """Return the processor's model or, where the system does not report it, its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def fingerprints(sources: Iterable[str | tuple[str, str] | None]) -> Iterable[tuple[str, str]]:
    """Yield (name, SHA-256) of each file and folder, and pairs unchanged. The hash of a folder includes file names."""
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
