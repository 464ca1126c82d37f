"""What every checkpoint of a training loop holds, and the checkpoint that an interrupted loop leaves."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW

from keel.errors import ConfigError, Interrupted, RewardError
from keel.interrupts import interrupts_allowed, interrupts_blocked, pending_interrupt
from keel.learn.guard import Guard, require_finite
from keel.learn.masters import load_trained_weights, trained_weights
from keel.run.checkpoint import Checkpoint, load_optimizer_tensors, optimizer_tensors, save_checkpoint
from keel.run.folder import RunFolder
from keel.world import World


@dataclass(frozen=True)
class TrainedState:
    """The trained weights with their optimizer and guard."""

    model: nn.Module
    optimizer: AdamW
    guard: Guard

    @property
    def weights(self) -> dict[str, Tensor]:
        """The trained weights by name, in float32, tied ones once."""
        # An adapter changes requires_grad while it is disabled, so the optimizer decides which weights are trained.
        return trained_weights(self.optimizer, self.model.named_parameters())

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy saved weights into the model."""
        load_trained_weights(self.optimizer, self.model.named_parameters(), weights)

    def save(
        self,
        folder: RunFolder,
        step: int,
        state: Mapping[str, Any],
        keep: int,
        tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
        models: Mapping[str, Callable[[Path], None]] | None = None,
    ) -> None:
        """Save a checkpoint with the loop's own `state`, `tensors` and `models` besides.

        Raises Diverged for weights that are not finite, CheckpointError when it cannot be written.
        """
        require_finite(self.model.named_parameters(), step)
        always = {"weights": self.weights, "optimizer": optimizer_tensors(self.optimizer)}
        with interrupts_blocked():
            save_checkpoint(
                folder,
                step,
                {**state, "guard": self.guard.counters()},
                {**always, **(tensors or {})},
                models or {},
                keep,
            )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load weights, moments and counters. Raises ConfigError for a checkpoint of another model."""
        weights = checkpoint.tensors("weights")
        if weights.keys() != self.weights.keys():
            raise ConfigError(
                "the checkpoint holds other weights than this model",
                where=str(checkpoint.path),
                fix="resume with the model and the LoRA settings that the run began with",
            )
        if any(weight.dtype.itemsize < 4 for weight in weights.values()):
            raise ConfigError(
                "the checkpoint holds 16-bit weights of an older keel; trained weights are float32 now",
                where=str(checkpoint.path),
                fix="start a new run, from the older run's model if you like",
            )
        self.load_weights(weights)
        load_optimizer_tensors(self.optimizer, checkpoint.tensors("optimizer"))
        self.guard.restore(checkpoint.state["guard"])


def checkpoint_due(step: int, every: int) -> bool:
    """Whether a checkpoint is due after this step; `every` 0 means never."""
    return every > 0 and step % every == 0


@contextmanager
def checkpoint_on_error(save: Callable[[], None], step: int, world: World) -> Iterator[None]:
    """Run a block that changes neither weights nor files; when it must end early, checkpoint the steps before it.

    A signal acts at once inside the block. With several processes it acts at the start of the block, so that all of
    them stop together. Args: `save` writes a checkpoint of `step` steps; after none there is nothing to save.
    """
    try:
        if world.size > 1:
            interrupt_together(world)
            yield
        else:
            with interrupts_allowed():
                yield
    except (RewardError, Interrupted) as error:
        if step > 0:
            save()
            if isinstance(error, RewardError):
                error.fix = f"{error.fix or 'fix it'}, then --resume"
        world.barrier()  # no process ends while the main one still writes
        raise


def interrupt_together(world: World) -> None:
    """Raise Interrupted on every process if a signal has reached one of them."""
    pending = pending_interrupt()
    if world.any(pending is not None):
        raise Interrupted(pending or "a signal to another process")
