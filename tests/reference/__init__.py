"""Pages of docs/reference/ that are generated from the code. `make reference` writes them.

Each module of this package with a function `page` generates the page of its name: `commands.page()` returns the text of
docs/reference/commands.md. A new page needs only a new module here, and an entry in `nav` of mkdocs.yml.
"""

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FOLDER = DOCS / "reference"
FIRST_LINE = "<!-- Generated from the code by `make reference`. Do not edit. -->"


def generate_pages() -> dict[Path, str]:
    """Return the file and the text of each generated page."""
    pages = {}
    for name in sorted(module.name for module in iter_modules([str(Path(__file__).parent)])):
        if name.startswith("_"):  # __main__ writes the pages when it is imported
            continue
        generator = getattr(import_module(f"{__name__}.{name}"), "page", None)
        if generator is not None:
            pages[FOLDER / f"{name}.md"] = f"{FIRST_LINE}\n\n{generator().strip()}\n"
    return pages


def list_outdated() -> list[str]:
    """Return the names of the generated pages that are missing, or whose text the code no longer generates."""
    return [
        path.name
        for path, text in generate_pages().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]


def write_pages() -> None:
    """Write all generated pages."""
    for path, text in generate_pages().items():
        path.write_text(text, encoding="utf-8")
