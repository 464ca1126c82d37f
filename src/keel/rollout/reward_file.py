"""Load reward functions from files, with the imports that `python FILE.py` would see."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from keel.errors import ConfigError
from keel.rollout.user_code import error_line, process_state_restored

_folders: dict[Path, "RewardFolder"] = {}


class RewardFolder:
    """A folder with reward files. Their code can import the other files of the folder.

    Files in two folders may have the same name. The code of each folder imports the file of that folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: dict[str, ModuleType] = {}  # all modules from this folder, by name
        self.files: dict[Path, ModuleType] = {}  # modules of the files that the settings name

    @contextmanager
    def importable(self) -> Iterator[None]:
        """Put the folder first in the search path of imports. Processes that are started inside inherit the path.

        Afterwards the folder's modules are removed, since one may have the name of a library that keel imports later.
        """
        libraries = {name: sys.modules[name] for name in self.modules if name in sys.modules}
        sys.modules.update(self.modules)
        initial = set(sys.modules)
        sys.path.insert(0, str(self.folder))
        try:
            yield
        finally:
            if str(self.folder) in sys.path:
                sys.path.remove(str(self.folder))
            new = {name: module for name, module in [*sys.modules.items()] if name not in initial}
            self.modules |= {name: module for name, module in new.items() if self._contains(name, module)}
            for name, module in self.modules.items():
                if sys.modules.get(name) is module:
                    del sys.modules[name]
            sys.modules.update(libraries)

    def load(self, file: Path) -> ModuleType:
        """Load the file as a module. Raises whatever its code raises, and ImportError if it is not a Python file."""
        if file not in self.files:
            with self.importable():
                # Dataclasses and pickle look up the module by its name while it runs, so it must be in sys.modules. A
                # library that has this name and is already imported must stay there.
                name = file.stem if file.stem not in sys.modules else f"reward_file_{file.stem}"
                spec = importlib.util.spec_from_file_location(name, file)
                if spec is None or spec.loader is None:
                    raise ImportError("not a Python file")
                module = sys.modules[name] = importlib.util.module_from_spec(spec)
                try:
                    spec.loader.exec_module(module)
                except BaseException:
                    del sys.modules[name]
                    raise
                self.modules[name] = self.files[file] = module
        return self.files[file]

    def _contains(self, name: str, module: ModuleType) -> bool:
        top, file = self.folder / name.partition(".")[0], getattr(module, "__file__", None)
        return isinstance(file, str) and (Path(file) == top.with_suffix(".py") or top in Path(file).parents)


def forget_files() -> None:
    """Load reward files again on their next use, with their imports: they may have changed."""
    _folders.clear()


def load_function(place: str) -> tuple[Callable[..., Any], RewardFolder]:
    """Load the function FILE.py:NAME. Return it with the folder that its code can import from. Raises ConfigError."""
    file, _, name = place.rpartition(":")
    if not file or not Path(file).is_file():
        raise ConfigError("no such file", where=place, fix="give FILE.py:NAME")
    path = Path(file).resolve()
    folder = _folders.setdefault(path.parent, RewardFolder(path.parent))
    try:
        with process_state_restored(file):
            module = folder.load(path)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the file may raise anything, including SystemExit and panics of Rust libraries
        raise ConfigError(
            f"{type(error).__name__} on import{error_line(error, str(path))}: {error}", where=file
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"no function {name!r}", where=file, fix="name a function of this file, as in FILE.py:NAME")
    return function, folder
