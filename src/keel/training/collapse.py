"""Refuse an update on numbers that are not finite, or on responses of a collapsed policy."""

import torch

from keel.config import AlgorithmSettings
from keel.data.batches import TrainingBatch
from keel.errors import Diverged
from keel.world import World


def check_finite(batch: TrainingBatch, world: World) -> None:
    """Raise Diverged, on all ranks, if a number that the update uses is not finite."""
    names = ("logprobs", "weights", "ref_logprobs", "values", "rewards", "advantages", "returns")
    bad = torch.stack([(~getattr(batch, name).isfinite() & batch.response_mask).any() for name in names])
    bad = world.sum(bad.float()) > 0
    if bool(bad.any()):
        first = names[int(bad.nonzero()[0])]
        raise Diverged(f"the {first} of this batch are not all finite", fix="check the weights and the rewards")


def check_alive(batch: TrainingBatch, limits: AlgorithmSettings, world: World) -> None:
    """Raise Diverged, on all ranks, if the policy has passed `algorithm.max_kl` or `algorithm.min_entropy`."""
    mask = batch.response_mask
    num_tokens, num_responses = world.sum(mask.sum()), world.sum(mask.any(1).sum())
    if not float(num_tokens):
        return
    kl = float(world.sum((batch.logprobs - batch.ref_logprobs)[mask].double().sum()) / num_responses)
    entropy = float(-world.sum(batch.logprobs[mask].double().sum()) / num_tokens)
    if limits.max_kl is not None and kl > limits.max_kl:
        raise Diverged(f"the KL to the reference is {kl:.3g}, above algorithm.max_kl", fix="raise algorithm.kl_coef")
    if limits.min_entropy is not None and entropy < limits.min_entropy:
        raise Diverged(f"the entropy is {entropy:.3g}, below algorithm.min_entropy", fix="raise algorithm.kl_coef")
