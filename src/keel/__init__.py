"""keel: teach a language model from human judgement.

`keel.train(config)` learns a policy; `keel.core` is the mathematics alone. Both load on first use.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a type checker takes `keel.train` for a plain module, which cannot be called
    from keel import core as core
    from keel.train import CallablePackage

    train: CallablePackage

__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    if name in ("core", "train"):
        return import_module(f"keel.{name}")
    raise AttributeError(f"module 'keel' has no attribute {name!r}")
