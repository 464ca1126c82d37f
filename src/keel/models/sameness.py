"""Compare two copies of a model, such as the trained and the saved one, by their outputs for fixed tokens."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keel.errors import CheckpointError
from keel.models.heads import compute_values, token_statistics, unwrap_model
from keel.models.packed import token_states
from keel.models.positions import num_positions
from keel.models.vocabulary import num_embeddings

ROWS, LENGTH = 2, 24
LIMITS = {2: 0.05, 4: 1e-4, 8: 1e-4}
"""Largest mean difference, relative to the mean magnitude, by bytes per weight. Merging an adapter rounds weights."""


def probe_tokens(model: Any) -> Tensor:
    """Return the tokens on which copies of a model are compared. -> [ROWS, L]"""
    config = unwrap_model(model).config.get_text_config()
    length = min(LENGTH, num_positions(model) or LENGTH)
    count = min(config.vocab_size, num_embeddings(model))
    tokens = torch.randint(count, (ROWS, length), generator=torch.Generator().manual_seed(0))
    return tokens.to(unwrap_model(model).device)


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    """Compute the logits of a language model or the scores of a classifier with transformers, adapters included."""
    model = unwrap_model(model)
    # RecurrentGemma raises an error when it creates a cache.
    no_cache = {} if model.get_output_embeddings() is None else {"use_cache": False}
    rows = [model(input_ids=row.unsqueeze(0), **no_cache).logits for row in probe_tokens(model)]
    return torch.cat(rows)


@torch.no_grad()
def probe_logprobs(model: Any, tokens: Tensor) -> Tensor:
    """Compute the log-probabilities of the tokens as in training. [N, L] -> [N * (L - 1)]"""
    previous = token_states(model, tokens, torch.ones_like(tokens, dtype=torch.bool)).view(*tokens.shape, -1)[:, :-1]
    return token_statistics(model, previous.flatten(0, 1), tokens[:, 1:].flatten())[0]


@torch.no_grad()
def probe_values(model: Any, head: nn.Module, tokens: Tensor) -> Tensor:
    """Compute the values of a head after each token. [N, L] -> [N * L]"""
    return compute_values(head, token_states(unwrap_model(model), tokens, torch.ones_like(tokens, dtype=torch.bool)))


def outputs_agree(one: Tensor, other: Tensor, model: Any) -> bool:
    """Return whether the outputs of two copies of this model differ only by the rounding of its weights."""
    size = unwrap_model(model).dtype.itemsize
    return difference(one, other) <= LIMITS[size]


def difference(one: Tensor, other: Tensor) -> float:
    """Return the mean difference relative to the mean magnitude, which counts as at least 1e-3."""
    one, other = one.double().cpu(), other.double().cpu()
    return float((one - other).abs().mean() / one.abs().mean().clamp(min=1e-3))


def require_same(trained: Tensor, saved: Tensor, model: Any, folder: Path) -> None:
    """Raise CheckpointError if the outputs of a trained model and of its saved copy differ by more than rounding."""
    if not outputs_agree(trained, saved, model):
        raise CheckpointError(
            f"the outputs of the saved model differ from those of the trained one by {difference(trained, saved):.2g}",
            where=str(folder),
            fix="the trained weights are in the newest checkpoint; report this",
        )
