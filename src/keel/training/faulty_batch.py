"""Keep the batch of a failed or skipped update, for `keel doctor` and for people."""

from dataclasses import fields

from torch import Tensor

from keel.data.batches import ScoredRollouts, TrainingBatch
from keel.run.faulty_rows import keep_rows
from keel.run.folder import RunFolder
from keel.run.rollout_log import rollout_rows
from keel.training.setup import TrainingSetup


def keep_batch(
    folder: RunFolder, setup: TrainingSetup, step: int, scored: ScoredRollouts, batch: TrainingBatch, what: str
) -> str:
    """Write `faults/step-000012/` with the responses, the numbers of each of their tokens, and the batch's tensors.

    Each rank writes its share. Returns the text of `keep_rows` for an error message.
    """
    named = {field.name: getattr(batch, field.name) for field in fields(batch)}
    tensors = {name: value.contiguous() for name, value in named.items() if isinstance(value, Tensor)}
    rank = f"-rank{setup.world.rank}" if setup.world.size > 1 else ""
    return keep_rows(folder, step, what, rollout_rows(scored, batch, batch.size, setup.tokenizer), tensors, rank)
