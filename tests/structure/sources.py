"""The files of a checkout: Python modules as syntax trees, sizes of folders by kind of file."""

import ast
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

KINDS = {".py": "python", ".c": "c", ".h": "c", ".js": "js", ".html": "templates", ".css": "css"}


@dataclass(frozen=True)
class Module:
    """One Python file of the package, as `keel.data.rows`; a package goes by the name of its folder."""

    name: str
    folder: str
    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)


def read_modules(package: Path) -> list[Module]:
    """All modules of a package, e.g. of src/keel, in the order of their paths."""
    modules = []
    for path in sorted(package.rglob("*.py")):
        folder = ".".join(path.relative_to(package.parent).parts[:-1])
        modules.append(Module(folder if path.stem == "__init__" else f"{folder}.{path.stem}", folder, path))
    return modules


def count_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def folder_sizes(package: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Folder -> kind of file -> files and lines. A folder does not include the folders in it."""
    sizes: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for path in sorted(package.rglob("*")):
        if path.is_file() and path.suffix in KINDS:
            folder = path.parent.relative_to(package.parent).as_posix()
            sizes[folder][KINDS[path.suffix]] += Counter(files=1, lines=count_lines(path))
    return {folder: {kind: dict(size) for kind, size in kinds.items()} for folder, kinds in sizes.items()}


def python_lines(folder: Path) -> int:
    """Lines of all Python files below a folder, comments and empty lines included."""
    return sum(count_lines(path) for path in folder.rglob("*.py"))
