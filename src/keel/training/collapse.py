"""Refuse an update that aims at something that is not finite, or that a collapsed policy sampled."""

import torch

from keel.config import AlgorithmSettings
from keel.data.batches import TrainingBatch
from keel.errors import Diverged
from keel.world import World


def check_finite(batch: TrainingBatch, world: World) -> None:
    """Raises Diverged, on all ranks, when the update would aim at something that is no number."""
    names = ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns")
    bad = torch.stack([(~getattr(batch, name).isfinite() & batch.response_mask).any() for name in names])
    bad = world.sum(bad.float()) > 0
    if bool(bad.any()):
        first = names[int(bad.nonzero()[0])]
        raise Diverged(f"the {first} of this batch are not all finite", fix="look at the weights and at the rewards")


def check_alive(batch: TrainingBatch, limits: AlgorithmSettings, world: World) -> None:
    """Raises Diverged, on all ranks, when the answers come from a policy that has collapsed, by the limits set."""
    mask = batch.response_mask
    tokens, answers = world.sum(mask.sum()), world.sum(mask.any(1).sum())
    if not float(tokens):
        return
    kl = float(world.sum((batch.logprobs - batch.ref_logprobs)[mask].double().sum()) / answers)
    entropy = float(-world.sum(batch.logprobs[mask].double().sum()) / tokens)
    if limits.max_kl is not None and kl > limits.max_kl:
        raise Diverged(f"the KL to the reference is {kl:.3g}, above algorithm.max_kl", fix="raise algorithm.kl_coef")
    if limits.min_entropy is not None and entropy < limits.min_entropy:
        raise Diverged(f"the entropy is {entropy:.3g}, below algorithm.min_entropy", fix="raise algorithm.kl_coef")
