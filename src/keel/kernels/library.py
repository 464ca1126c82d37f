"""The compiled kernels: built once for a processor and a compiler, kept in the user's cache."""

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

SOURCES = ("attention.c", "decode.c", "rows.c")
HEADERS = ("vectors.h",)
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
THREADS = "-fopenmp"
SECONDS = 120  # a compiler that takes longer is given up


def available(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors: float32, on a CPU, compiled."""
    for x in tensors:
        if x.dtype is not torch.float32 or not x.is_cpu:
            return False
    return library() is not None


@cache
def library() -> ctypes.CDLL | None:
    """None where they are turned off, or cannot be compiled or loaded: torch's own operations serve then."""
    if os.environ.get("KEEL_KERNELS") == "off":
        return None
    try:
        place = build_library()
        try:
            return ctypes.CDLL(str(place))
        except OSError:  # damaged: once more
            place.unlink()
            return ctypes.CDLL(str(build_library()))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError):
        return None


def build_library() -> Path:
    """The library for this source, compiler and processor, compiled if it is not in the cache.

    Raises OSError, RuntimeError (no home folder), ValueError (CC is no command) or SubprocessError where that fails.
    """
    here, compiler = Path(__file__).parent, shlex.split(os.environ.get("CC") or "cc")
    parts = [run_command([*compiler, "--version"]), processor_features(), " ".join((*FLAGS, THREADS)).encode()]
    parts += [(here / name).read_bytes() for name in (*HEADERS, *SOURCES)]
    place = cache_folder() / f"kernels-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:24]}.so"
    if not place.exists():
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            target = Path(scratch) / "kernels.so"
            command = [*compiler, *FLAGS, "-shared", "-o", str(target), *(str(here / name) for name in SOURCES), "-lm"]
            try:
                run_command([*command, THREADS])
            except subprocess.CalledProcessError:  # a compiler without OpenMP: one thread
                run_command(command)
            target.replace(place)  # so that no process ever sees half of it
    return place


def cache_folder() -> Path:
    """Where libraries are kept. Raises PermissionError if anybody else could put one there."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "keel"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} belongs to others too")
    return folder


def run_command(command: Sequence[str]) -> bytes:
    return subprocess.run(command, capture_output=True, check=True, timeout=SECONDS).stdout


def processor_features() -> bytes:
    """What this processor can do: code for one may not run on another that shares the home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})).encode()
