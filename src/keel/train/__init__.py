"""The loops of all stages, one screen each.

The package itself can be called: `keel.train(config)` is what `keel train` does, as documented, while
`keel.train.policy` and its neighbours stay ordinary modules. A module may be given a class of its own for this.
"""

import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(
        self,
        config: Any,
        scorers: Sequence[Callable[..., Any]] | None = None,
        prompts: Sequence[Any] | None = None,
        resume: bool = False,
    ) -> dict[str, float]:
        """Learn a policy: `config` is a TrainConfig or a mapping; see `keel.train.policy.train_policy`."""
        from keel.train.policy import train_policy

        return train_policy(config, scorers or (), prompts, resume=resume)


sys.modules[__name__].__class__ = _CallablePackage
