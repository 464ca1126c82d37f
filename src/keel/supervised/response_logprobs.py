"""Log-probabilities of responses under the trained policy, with and without gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from keel.data.padding import microbatches
from keel.data.turns import Example
from keel.models.heads import compute_dtype, unwrap_model
from keel.models.sharding import idle_passes, with_idle
from keel.supervised.held_out import measure_rows
from keel.supervised.sft import target_losses
from keel.world import World


def response_logprobs(model: Any, responses: Sequence[Example], microbatch_tokens: int) -> Tensor:
    """Compute log pi(y|x) of each response, the sum over its tokens with the end token, with gradient. -> [M]

    A sharded model makes as many passes on each process as on the one with the most micro-batches.
    """
    if not responses:
        return torch.zeros(0)
    groups = microbatches([len(response.tokens) for response in responses], microbatch_tokens)
    sums = []
    for group in groups:
        logprobs = -target_losses(model, [responses[i] for i in group])
        sums += [part.sum() for part in logprobs.split([responses[i].num_targets for i in group])]
    idle = [target_losses(model, responses[:1]) for _ in range(idle_passes(model, len(groups)))]
    order = torch.tensor([i for group in groups for i in group], device=sums[0].device)
    return with_idle(torch.stack(sums)[order.argsort()], idle)


def count_response_tokens(responses: Sequence[Example]) -> Tensor:
    """Return the number of tokens of each response, with the end token. -> [M]"""
    return torch.tensor([response.num_targets for response in responses], dtype=torch.float64)


def measure_logprobs(model: Any, responses: Sequence[Example], microbatch_tokens: int, world: World) -> Tensor:
    """Compute log pi(y|x) of each response without gradients; each process computes a share. -> [M], on all"""

    def measure(rows: list[int]) -> list[float]:
        logprobs: list[float] = response_logprobs(model, [responses[row] for row in rows], microbatch_tokens).tolist()
        return logprobs

    logprobs = measure_rows(model, [len(response.tokens) for response in responses], measure, world)
    dtype = torch.promote_types(compute_dtype(model), torch.float32)
    return torch.tensor(logprobs, dtype=dtype, device=unwrap_model(model).device)
