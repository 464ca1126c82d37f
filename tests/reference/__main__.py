"""Write every generated page: each module of this package has PAGE, its file, and render(), its text."""

from importlib import import_module
from pathlib import Path

HERE = Path(__file__).parent

if __name__ == "__main__":
    for path in sorted(HERE.glob("[!_]*.py")):
        if not path.name.startswith("test_"):
            module = import_module(f"tests.reference.{path.stem}")
            module.PAGE.write_text(module.render(), encoding="utf-8")
            print(module.PAGE)
