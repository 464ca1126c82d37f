"""What is kept of a batch on which an update went wrong, for `keel doctor` and for people."""

from dataclasses import fields

from torch import Tensor

from keel.data.batches import ScoredRollouts, TrainingBatch
from keel.run.faulty_rows import keep_rows
from keel.run.folder import RunFolder
from keel.run.rollout_log import rollout_rows
from keel.training.setup import TrainingSetup


def keep_batch(
    folder: RunFolder, parts: TrainingSetup, step: int, scored: ScoredRollouts, batch: TrainingBatch, what: str
) -> str:
    """`faults/step-000012/` of policy learning: the answers with every figure of their tokens, and the whole batch.

    Each rank keeps its own part. Returns what `keep_rows` returns.
    """
    named = {field.name: getattr(batch, field.name) for field in fields(batch)}
    tensors = {name: value.contiguous() for name, value in named.items() if isinstance(value, Tensor)}
    rank = f"-rank{parts.world.rank}" if parts.world.size > 1 else ""
    return keep_rows(folder, step, what, rollout_rows(scored, batch, batch.size, parts.tokenizer), tensors, rank)
