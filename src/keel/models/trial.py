"""Conditions for the trial of a model: float32 weights, short attention windows, and rows to read.

In bfloat16, a fault looks like rounding, and a row of twelve tokens does not fill a window of 4096. In a trial
the weights are float32 and the windows are short, so that a few tokens are enough.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from keel.models.heads import trunk, unwrap_model
from keel.models.layers import has_known_layers
from keel.models.positions import num_positions

LENGTHS = (12, 7)
"""Lengths of the rows of a trial. They differ, and are longer than a short window."""
FEW_LAYERS = 2
"""Layers that run in a trial of a model whose layers are all of one kind."""
WINDOW = 3
"""Length of a window in a trial."""
WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "attention_window",
    "attention_window_size",
    "attention_chunk_size",
    "chunk_length",  # Reformer, with the two below
    "local_attn_chunk_length",
    "lsh_attn_chunk_length",
    "keep_window_size",  # Doge: number of keys that a token attends to, as below
    "index_topk",  # DeepSeek V3.2
)
"""Settings, and attributes of layers, that limit the number of tokens to which a token attends."""


@contextmanager
def trial(model: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Try a model with float32 weights, short windows and few layers.

    Yields rows of ordinary tokens [B, L] and their mask.
    """
    model = unwrap_model(model)
    with torch.no_grad(), few_layers(model), _in_float32(model), _short_windows(model):
        yield _rows(model)


@contextmanager
def few_layers(model: Any) -> Iterator[None]:
    """Inside, a model whose layers are all of one kind has only the first ones.

    They show how the model computes, in a small part of the time and, for 16-bit weights, of the memory.
    """
    stack: Any = trunk(model)
    if not has_known_layers(stack):
        yield
        return
    layers = stack.layers
    stack.layers = layers[:FEW_LAYERS]
    try:
        yield
    finally:
        stack.layers = layers


def states_agree(states: Tensor, others: Tensor) -> bool:
    """Return whether states differ only by the rounding of float32. NaN is never close."""
    largest = max(1.0, float(others.abs().max()))
    return states.shape == others.shape and torch.allclose(states, others, rtol=1e-3, atol=1e-4 * largest)


def _rows(model: Any) -> tuple[Tensor, Tensor]:
    """Return tokens from the middle of the vocabulary that have no special role in the config."""
    config = model.config.get_text_config()
    special = {value for name, value in _settings(model.config) if name.endswith(("_id", "_index"))}
    middle = range(config.vocab_size // 3, config.vocab_size)
    ordinary = [token for token in chain(middle, range(config.vocab_size)) if token not in special][: sum(LENGTHS)]
    width = min(max(LENGTHS), num_positions(model) or max(LENGTHS))
    tokens = torch.tensor(ordinary, device=model.device).repeat(len(LENGTHS) * width)[: len(LENGTHS) * width]
    lengths = torch.tensor([width, min(min(LENGTHS), max(1, width - 1))], device=model.device)
    mask = torch.arange(width, device=model.device) >= width - lengths.unsqueeze(1)
    return tokens.view(len(LENGTHS), width), mask


def _settings(config: Any) -> Iterator[tuple[str, Any]]:
    for each in {id(config): config, id(config.get_text_config()): config.get_text_config()}.values():
        yield from ((name, value) for name, value in vars(each).items() if isinstance(value, int))


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Inside, 16-bit weights are float32. Afterwards the original tensors return, so that tied weights stay tied."""
    originals = [
        (tensor, tensor.data)
        for tensor in chain(model.parameters(), model.buffers())
        if tensor.is_floating_point() and tensor.dtype.itemsize == 2
    ]
    try:
        for tensor, data in originals:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in originals:
            tensor.data = data


@contextmanager
def _short_windows(model: nn.Module) -> Iterator[None]:
    """Inside, windows have WINDOW tokens, both in the configs, which determine masks and caches, and in the layers.

    A window of all positions is not changed: no row exceeds it, and Doge may not be causal with a shorter one.
    """
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    longest = num_positions(model) or sys.maxsize
    places = [
        (owner, name, getattr(owner, name))
        for owner in (*configs.values(), *model.modules())
        for name in WINDOWS
        if isinstance(getattr(owner, name, None), int) and WINDOW < getattr(owner, name) < longest
    ]
    try:
        for owner, name, _ in places:
            setattr(owner, name, WINDOW)
        yield
    finally:
        for owner, name, window in places:
            setattr(owner, name, window)
