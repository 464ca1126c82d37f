"""Compile the kernels once per processor and compiler, and keep the library in the user's cache."""

import ctypes
import hashlib
import os
import platform
import shlex
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCES = ("advance.c", "attention.c", "decode.c", "linear.c", "product.c", "rows.c")
HEADERS = ("vectors.h", "kernels.h", "linear_tile.h", "rows_typed.h")
# -fno-math-errno lets the compiler use vector instructions for square roots. -Wno-psabi hides notes about the calling
# convention of vector arguments, which matters between libraries only.
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
THREADS = "-fopenmp"
SECONDS = 120  # time limit of the compiler
PLAIN = (Tensor, torch.nn.Parameter)


def available(*tensors: Tensor, narrow: Sequence[Tensor] = ()) -> bool:
    """Return whether the kernels are compiled and can compute on these tensors: float32, on a CPU.

    Subclasses of tensors, such as DTensor, may have no memory that the kernels could read.

    Args:
        narrow: tensors that may also be bfloat16.
    """
    for x in tensors:
        if x.dtype is not torch.float32 or not x.is_cpu or type(x) not in PLAIN:
            return False
    for x in narrow:
        if x.dtype not in (torch.float32, torch.bfloat16) or not x.is_cpu or type(x) not in PLAIN:
            return False
    return library() is not None


@cache
def library() -> ctypes.CDLL | None:
    """Load the library. Return None if the kernels are turned off, or cannot be compiled or loaded.

    Callers then use torch's operations.
    """
    if os.environ.get("KEEL_KERNELS") == "off":
        return None
    try:
        path = build_library()
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # the file in the cache may be damaged
            path.unlink()
            return ctypes.CDLL(str(build_library()))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError):
        return None


def build_library() -> Path:
    """Return the path of the library for this source, compiler and processor. Compile it if it is not in the cache.

    Raises OSError, RuntimeError (no home folder), ValueError (CC is not a command) or SubprocessError on failure.
    """
    here, compiler = Path(__file__).parent, shlex.split(os.environ.get("CC") or "cc")
    parts = [run_command([*compiler, "--version"]), processor_features(), " ".join((*FLAGS, THREADS)).encode()]
    parts += [(here / name).read_bytes() for name in (*HEADERS, *SOURCES)]
    path = cache_folder() / f"kernels-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:24]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            target = Path(scratch) / "kernels.so"
            command = [*compiler, *FLAGS, "-shared", "-o", str(target), *(str(here / name) for name in SOURCES), "-lm"]
            try:
                run_command([*command, THREADS])
            except subprocess.CalledProcessError:  # a compiler without OpenMP: the kernels use one thread
                run_command(command)
            target.replace(path)  # atomic, so that no process loads half a file
    return path


def cache_folder() -> Path:
    """Return the folder of the libraries. Raises PermissionError if another user could write a library there."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "keel"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"other users can write to {folder}")
    return folder


def run_command(command: Sequence[str]) -> bytes:
    return subprocess.run(command, capture_output=True, check=True, timeout=SECONDS).stdout


def processor_features() -> bytes:
    """Return the model and the instruction sets of this processor.

    Machines that share a home folder may have other processors, on which the library would not run.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})).encode()
