"""The loops of all stages, one screen each.

The package itself can be called: `keel.train(config)` is what `keel train` does, as documented, while
`keel.train.policy` and its neighbours stay ordinary modules. A module may be given a class of its own for this.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keel.config import TrainConfig


class CallablePackage(ModuleType):
    """The module `keel.train`, which can be called."""

    def __call__(
        self,
        config: "TrainConfig | Mapping[str, Any]",
        scorers: Sequence[Callable[..., Any]] | None = None,
        prompts: Any = None,
        resume: bool = False,
    ) -> dict[str, float]:
        """Learn a policy: `config` is a TrainConfig or a mapping; see `keel.train.policy.train_policy`."""
        from keel.train.policy import train_policy

        return train_policy(config, scorers or (), prompts, resume=resume)


sys.modules[__name__].__class__ = CallablePackage
