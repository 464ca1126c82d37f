"""What is published holds all that is needed to use it, and to test it."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MADE = {".git", ".venv", ".venv-vllm", ".mypy_cache", ".pytest_cache", ".ruff_cache", "build", "dist", "runs", "shared"}


def published() -> set[str]:
    """Files and folders at the top of the source distribution, besides those that every one has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    return {name.removeprefix("/") for name in named} | {"pyproject.toml", ".gitignore", "PKG-INFO"}


def test_nothing_is_named_that_is_not_there() -> None:
    assert [name for name in published() - {"PKG-INFO", ".gitignore"} if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("script", ["Makefile", ".ci/run", "CONTRIBUTING.md"])
def test_what_the_scripts_need_is_in_it(script: str) -> None:
    words = set(re.findall(r"[\w.-]+", (ROOT / script).read_text()))
    needed = {word for word in words if (ROOT / word).exists()} - MADE - {".", ".."}
    assert needed - published() == set()


def test_what_is_not_python_travels_with_the_package() -> None:
    """The wheel takes the whole folder, so that nothing may exclude from it."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert build["targets"]["wheel"] == {"packages": ["src/keel"]}
    assert set(build) == {"targets"}
