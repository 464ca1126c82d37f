"""Structure of a checkout in numbers: folders, imports, names, comments and words.

    python -m tests.structure [--root CHECKOUT] [--json FILE] [--details]

The number of settings takes an import of keel, and is left out where that keel is not the checkout's (set PYTHONPATH).
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .imports import circles, folder_graph, folder_imports, import_graph
from .names import duplicate_names, participle_functions, preposition_functions
from .prose import comments_per_thousand_lines, documents, longest_paragraph, retired_words
from .sources import folder_sizes, python_lines, read_modules

CHECKOUT = Path(__file__).parents[2]


def measure(root: Path) -> dict[str, Any]:
    """Everything that is counted, ready for JSON."""
    package = root / "src" / "keel"
    modules = read_modules(package)
    return {
        "folders": folder_sizes(package),
        "imports": {f"{source} -> {target}": count for (source, target), count in folder_imports(modules).items()},
        "folder_circles": circles(folder_graph(modules)),
        "module_circles": circles(import_graph(modules)),
        "duplicate_names": duplicate_names(modules),
        "participle_functions": participle_functions(modules),
        "preposition_functions": preposition_functions(modules),
        "comments_per_1000_lines": round(comments_per_thousand_lines(modules), 1),
        "test_lines_per_source_line": round(python_lines(root / "tests") / python_lines(package), 3),
        "train_settings": count_train_settings(root),
        "readme_words": len((root / "README.md").read_text(encoding="utf-8").split()),
        "longest_paragraphs": {
            path.relative_to(root).as_posix(): longest_paragraph(path.read_text(encoding="utf-8"))
            for path in documents(root)
        },
        "retired_words": retired_words(root, modules),
    }


def count_train_settings(root: Path) -> int | None:
    """Settings of `keel train`; None where the keel that is imported does not belong to `root`."""
    import keel
    from keel.config import TrainConfig, setting_names

    if not Path(keel.__file__).resolve().is_relative_to(root.resolve()):
        return None
    return len(list(setting_names(TrainConfig)))


def rows_of_summary(found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The numbers that a refactoring is meant to move."""
    python = [kinds["python"] for kinds in found["folders"].values() if "python" in kinds]
    words = found["retired_words"].values()
    return [
        ("folders with Python files", len(python)),
        ("Python files", sum(size["files"] for size in python)),
        ("Python lines", sum(size["lines"] for size in python)),
        ("pairs of folders with imports", len(found["imports"])),
        ("imports between folders", sum(found["imports"].values())),
        ("circles of folders", len(found["folder_circles"])),
        ("circles of modules", len(found["module_circles"])),
        ("public names defined more than once", len(found["duplicate_names"])),
        ("functions named by a participle", len(found["participle_functions"])),
        ("functions that end in a preposition", len(found["preposition_functions"])),
        ("comments per 1,000 lines of code", found["comments_per_1000_lines"]),
        ("lines of tests per line of source", found["test_lines_per_source_line"]),
        ("settings of keel train", found["train_settings"]),
        ("words of README.md", found["readme_words"]),
        ("documents with a paragraph over 100 words", sum(n > 100 for n in found["longest_paragraphs"].values())),
        *((f"retired words in {kind}", sum(word[kind] for word in words)) for kind in next(iter(words))),
    ]


def print_table(title: str, rows: list[tuple[Any, ...]]) -> None:
    """Columns as wide as their longest cell; the first to the left, the others to the right."""
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}")
    for first, *others in cells:
        right = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *right]))


def print_summary(found: Mapping[str, Any]) -> None:
    sizes = [
        (folder, kind, size["files"], size["lines"])
        for folder, kinds in found["folders"].items()
        for kind, size in kinds.items()
    ]
    print_table("Folders", [("folder", "kind", "files", "lines"), *sizes])
    words = [(word, *counts.values()) for word, counts in found["retired_words"].items()]
    print_table("Retired words", [("word", "docs", "pages", "source", "identifiers"), *words])
    print_table("Longest paragraph", [("document", "words"), *found["longest_paragraphs"].items()])
    print_table("Summary", rows_of_summary(found))


def print_details(found: Mapping[str, Any]) -> None:
    """The names and places behind the numbers."""
    print_table("Imports between folders", [("from -> to", "count"), *found["imports"].items()])
    print_lines("Circles of folders", [", ".join(circle) for circle in found["folder_circles"]])
    print_lines("Circles of modules", [", ".join(circle) for circle in found["module_circles"]])
    duplicates = found["duplicate_names"].items()
    print_lines("Names defined more than once", [f"{name}: {', '.join(modules)}" for name, modules in duplicates])
    print_lines("Functions named by a participle", found["participle_functions"])
    print_lines("Functions that end in a preposition", found["preposition_functions"])


def print_lines(title: str, lines: list[str]) -> None:
    print(f"\n{title}", *(lines or ["none"]), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=CHECKOUT, help="the checkout to measure (default: this one)")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--details", action="store_true", help="print names and places too")
    options = parser.parse_args()
    found = measure(options.root)
    print_summary(found)
    if options.details:
        print_details(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
