"""Files of reward functions, as the modules that they are for `python FILE.py`."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from keel.errors import ConfigError
from keel.rollout.foreign import error_line, process_kept

_homes: dict[Path, "Home"] = {}


class Home:
    """A folder with reward files. While their code runs, it can import what lies beside it.

    Files in two folders may have the same name: each folder sees its own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: dict[str, ModuleType] = {}  # all that came from this folder, by name
        self.files: dict[Path, ModuleType] = {}  # those that the settings name

    @contextmanager
    def importable(self) -> Iterator[None]:
        """Within it the folder comes first where Python looks for modules; processes begun within it inherit that.

        Afterwards its modules are out of the way: one may have the name of a library that keel imports later.
        """
        libraries = {name: sys.modules[name] for name in self.modules if name in sys.modules}
        sys.modules.update(self.modules)
        before = set(sys.modules)
        sys.path.insert(0, str(self.folder))
        try:
            yield
        finally:
            if str(self.folder) in sys.path:
                sys.path.remove(str(self.folder))
            new = {name: module for name, module in [*sys.modules.items()] if name not in before}
            self.modules |= {name: module for name, module in new.items() if self._holds(name, module)}
            for name, module in self.modules.items():
                if sys.modules.get(name) is module:
                    del sys.modules[name]
            sys.modules.update(libraries)

    def load(self, file: Path) -> ModuleType:
        """The file's module. Raises whatever its code raises, and ImportError for what is no Python file."""
        if file not in self.files:
            with self.importable():
                # Dataclasses and pickle look for it under its name while it runs. An imported library keeps its own.
                name = file.stem if file.stem not in sys.modules else f"reward_file_{file.stem}"
                spec = importlib.util.spec_from_file_location(name, file)
                if spec is None or spec.loader is None:
                    raise ImportError("no Python file")
                module = sys.modules[name] = importlib.util.module_from_spec(spec)
                try:
                    spec.loader.exec_module(module)
                except BaseException:
                    del sys.modules[name]
                    raise
                self.modules[name] = self.files[file] = module
        return self.files[file]

    def _holds(self, name: str, module: ModuleType) -> bool:
        top, file = self.folder / name.partition(".")[0], getattr(module, "__file__", None)
        return isinstance(file, str) and (Path(file) == top.with_suffix(".py") or top in Path(file).parents)


def forget_files() -> None:
    """Let files be read anew, with what they import from their folders: they may have changed."""
    _homes.clear()


def load_function(place: str) -> tuple[Callable[..., Any], Home]:
    """FILE.py:NAME to the function and the folder that it can import from. Raises ConfigError."""
    file, _, name = place.rpartition(":")
    if not file or not Path(file).is_file():
        raise ConfigError("no such file", where=place, fix="give FILE.py:NAME")
    path = Path(file).resolve()
    home = _homes.setdefault(path.parent, Home(path.parent))
    try:
        with process_kept(file):
            module = home.load(path)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the file may raise anything, sys.exit and panics of Rust libraries included
        raise ConfigError(
            f"{type(error).__name__} on import{error_line(error, str(path))}: {error}", where=file
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"no function {name!r}", where=file, fix="name a function of this file, as in FILE.py:NAME")
    return function, home
