"""Compiled once, found again, and done without where that fails."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from keel.kernels import library

COMPILER = os.environ.get("CC", "cc")
needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason="there is no C compiler here")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("KEEL_KERNELS", raising=False)
    return tmp_path / "keel"


@needs_compiler
def test_it_is_compiled_once(empty_cache: Path) -> None:
    place = library.build_library()
    when = place.stat().st_mtime_ns
    assert library.build_library() == place
    assert place.stat().st_mtime_ns == when
    assert [file.name for file in empty_cache.iterdir()] == [place.name]
    assert empty_cache.stat().st_mode & 0o077 == 0  # nobody else may put a library there


@needs_compiler
def test_another_processor_gets_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    first = library.build_library()
    monkeypatch.setattr(library, "processor_features", lambda: b"another")
    assert library.build_library() != first


@needs_compiler
def test_a_damaged_library_is_compiled_again() -> None:
    library.build_library().write_bytes(b"damaged")
    assert library.library.__wrapped__() is not None


@needs_compiler
def test_a_folder_that_others_can_write_to_is_not_trusted(empty_cache: Path) -> None:
    empty_cache.mkdir()
    empty_cache.chmod(0o777)
    assert library.library.__wrapped__() is None
    assert not list(empty_cache.iterdir())


def test_no_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    assert library.library.__wrapped__() is None


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", 'cc "'])
def test_no_compiler_no_kernels(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler)
    assert library.library.__wrapped__() is None


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert library.library.__wrapped__() is None


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are levels of x86 processors")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_they_compile_for_older_and_newer_processors(processor: str, tmp_path: Path) -> None:
    folder = Path(library.__file__).parent
    flags = [f"-march={processor}" if flag == "-march=native" else flag for flag in library.FLAGS]
    sources = [str(folder / name) for name in library.SOURCES]
    command = [*shlex.split(COMPILER), *flags, "-shared", "-o", str(tmp_path / "kernels.so"), *sources, "-lm"]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (compiled.returncode, compiled.stderr) == (0, "")
    assert (tmp_path / "kernels.so").stat().st_size > 10_000


def test_they_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEL_KERNELS", "off")
    assert library.library.__wrapped__() is None


def test_what_they_take() -> None:
    assert not library.available(torch.zeros(1, dtype=torch.float64))
    assert not library.available(torch.zeros(1, dtype=torch.bfloat16))
    assert not library.available(torch.zeros(1), torch.zeros(1, device="meta"))


@needs_compiler
def test_the_flags_of_the_processor_are_left_alone() -> None:
    """A library linked with -ffast-math would make all of torch treat the smallest numbers as zero."""
    code = "import torch; from keel import kernels; print(kernels.available(), bool(torch.tensor(1e-38) * 1e-3 > 0))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "True True\n"
