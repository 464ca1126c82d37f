"""Whether two models are the same, such as the trained one and the saved one: what they compute of fixed tokens."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keel.errors import CheckpointError
from keel.models.heads import compute_values, plain, token_statistics
from keel.models.packed import token_states
from keel.models.positions import num_positions
from keel.models.vocabulary import num_embeddings

ROWS, LENGTH = 2, 24
LIMITS = {2: 0.05, 4: 1e-4, 8: 1e-4}
"""Largest mean difference in units of the mean size, by bytes of a weight. A merged adapter rounds its weights."""


def probe_tokens(model: Any) -> Tensor:
    """Tokens that any two copies of a model are compared on. -> [ROWS, L]"""
    config = plain(model).config.get_text_config()
    length = min(LENGTH, num_positions(model) or LENGTH)
    count = min(config.vocab_size, num_embeddings(model))
    tokens = torch.randint(count, (ROWS, length), generator=torch.Generator().manual_seed(0))
    return tokens.to(plain(model).device)


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    """Logits of a language model or scores of a classifier, as transformers computes them, adapters included."""
    model = plain(model)
    # RecurrentGemma raises where it makes its own cache
    no_cache = {} if model.get_output_embeddings() is None else {"use_cache": False}
    rows = [model(input_ids=row.unsqueeze(0), **no_cache).logits for row in probe_tokens(model)]
    return torch.cat(rows)


@torch.no_grad()
def probe_logprobs(model: Any, tokens: Tensor) -> Tensor:
    """Log-probabilities of the probe's tokens, computed as in training. [N, L] -> [N * (L - 1)]"""
    before = token_states(model, tokens, torch.ones_like(tokens, dtype=torch.bool)).view(*tokens.shape, -1)[:, :-1]
    return token_statistics(model, before.flatten(0, 1), tokens[:, 1:].flatten())[0]


@torch.no_grad()
def values(model: Any, head: nn.Module, tokens: Tensor) -> Tensor:
    """What a head makes of the states after each of the probe's tokens. [N, L] -> [N * L]"""
    return compute_values(head, token_states(plain(model), tokens, torch.ones_like(tokens, dtype=torch.bool)))


def same(one: Tensor, other: Tensor, model: Any) -> bool:
    """Whether the outputs of two copies of this model differ by the rounding of its weights only."""
    size = next(plain(model).parameters()).dtype.itemsize
    return difference(one, other) <= LIMITS[size]


def difference(one: Tensor, other: Tensor) -> float:
    """Mean difference in units of the mean size, which counts as 1e-3 at least."""
    one, other = one.double().cpu(), other.double().cpu()
    return float((one - other).abs().mean() / one.abs().mean().clamp(min=1e-3))


def require_same(trained: Tensor, saved: Tensor, model: Any, folder: Path) -> None:
    """Raise CheckpointError where the outputs of a trained model and of what was saved of it differ."""
    if not same(trained, saved, model):
        raise CheckpointError(
            f"the saved model differs from the trained one, by {difference(trained, saved):.2g} of its outputs",
            where=str(folder),
            fix="the trained weights are in the newest checkpoint; report this",
        )
