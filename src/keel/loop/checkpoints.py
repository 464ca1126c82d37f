"""Save and restore the state that all training loops share, and checkpoint a loop that is interrupted."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW

from keel.errors import ConfigError, EngineError, Interrupted, RewardError
from keel.interrupts import interrupts_allowed, interrupts_blocked, pending_interrupt
from keel.learn.guard import Guard, require_finite
from keel.learn.masters import load_trained_weights, trained_weights
from keel.run.checkpoint import Checkpoint, save_checkpoint
from keel.run.folder import RunFolder
from keel.run.saved_tensors import OTHER_MODEL, load_optimizer_tensors, optimizer_tensors
from keel.world import World


@dataclass(frozen=True)
class TrainedState:
    """The trained weights with their optimizer and guard."""

    model: nn.Module
    optimizer: AdamW
    guard: Guard

    @property
    def weights(self) -> dict[str, Tensor]:
        """The trained weights by name, in float32; tied weights appear once."""
        # An adapter changes requires_grad while it is disabled, so the optimizer decides which weights are trained.
        return trained_weights(self.optimizer, self.model.named_parameters())

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy weights into the model."""
        load_trained_weights(
            self.optimizer, self.model.named_parameters(), lambda name, weight: weight.copy_(weights[name])
        )

    def save(
        self,
        folder: RunFolder,
        step: int,
        state: Mapping[str, Any],
        keep: int,
        world: World,
        tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
        models: Mapping[str, Callable[[Path], None]] | None = None,
    ) -> None:
        """Save a checkpoint. Every process must call it.

        Args:
            state: values of the loop, as JSON can hold them.
            keep: number of checkpoints to keep; 0 keeps all.
            tensors: more sets of tensors, by file name.
            models: functions that write a model folder, by folder name.

        Raises Diverged for weights that are not finite, CheckpointError if the checkpoint cannot be written.
        """
        require_finite(self.model.named_parameters(), step)
        trained = {"weights": self.weights, "optimizer": optimizer_tensors(self.optimizer)}
        with interrupts_blocked():
            save_checkpoint(
                folder,
                step,
                {**state, "guard": self.guard.counters()},
                {**trained, **(tensors or {})},
                models or {},
                keep,
                world,
            )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load weights, moments and counters. Raises ConfigError for a checkpoint of another model."""
        # Compare the names before anything is copied: a model of the wrong kind must not be half restored.
        saved = checkpoint.tensors("weights")
        if saved.names != self.weights.keys():
            raise ConfigError(
                "the checkpoint has other weights than this model", where=str(checkpoint.path), fix=OTHER_MODEL
            )
        if any(saved.dtype(name).itemsize < 4 for name in saved.names):
            raise ConfigError(
                "the checkpoint holds 16-bit weights of an older keel; trained weights are float32 now",
                where=str(checkpoint.path),
                fix="start a new run",
            )
        load_trained_weights(self.optimizer, self.model.named_parameters(), saved.fill)
        load_optimizer_tensors(self.optimizer, checkpoint.tensors("optimizer"))
        self.guard.restore(checkpoint.state["guard"])


def checkpoint_due(step: int, every: int) -> bool:
    """Whether a checkpoint is due after this step; `every` 0 means never."""
    return every > 0 and step % every == 0


@contextmanager
def checkpoint_on_error(save: Callable[[], None], step: int, world: World) -> Iterator[None]:
    """Save a checkpoint if the block raises RewardError or EngineError, or is interrupted.

    The block must change neither weights nor files, so that the checkpoint is of the steps done before it. One process
    handles a signal at any place of the block. Several processes handle it at the start, so that all stop together.

    Args:
        save: write a checkpoint.
        step: number of steps done; with 0 there is nothing to save.
    """
    try:
        if world.size > 1:
            interrupt_together(world)
            yield
        else:
            with interrupts_allowed():
                yield
    except (RewardError, EngineError, Interrupted) as error:
        if step > 0:
            save()
            if isinstance(error, RewardError):
                error.fix = f"{error.fix or 'fix the scorer'}, then --resume"
        world.barrier()  # no process may end while the main one still writes
        raise


def interrupt_together(world: World) -> None:
    """Raise Interrupted on every process if a signal has reached any process."""
    world.wait_for_all()  # the main process may still be logging
    pending = pending_interrupt()
    if world.any(pending is not None):
        raise Interrupted(pending or "a signal to another process")
