"""The Python blocks of README.md and docs/, a file for each, for mypy. `python -m tests.documented` writes them."""

import re
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def python_blocks() -> dict[str, str]:
    """File name -> text of each block of Python that the documents show, in the order of the pages."""
    blocks: dict[str, str] = {}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        stem = "_".join(page.relative_to(ROOT).with_suffix("").parts).replace("-", "_").lower()
        texts = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        blocks |= {f"{stem}_{number}.py": text for number, text in enumerate(texts, start=1)}
    return blocks


def written_blocks() -> dict[str, str]:
    """The same as the files of this folder have them."""
    return {path.name: path.read_text(encoding="utf-8") for path in HERE.glob("*_[0-9]*.py")}


def write_blocks() -> None:
    """Make the files of this folder those that the documents show."""
    for name in written_blocks():
        (HERE / name).unlink()
    for name, text in python_blocks().items():
        (HERE / name).write_text(text, encoding="utf-8")
