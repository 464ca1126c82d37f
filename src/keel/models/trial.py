"""What trials of a model need: exact arithmetic, windows that a short row leaves, and rows to read.

A difference that matters and a difference of rounding look alike in bfloat16, and a window of 4096 tokens is not met by
a row of twelve. Within a trial the weights are float32 and the windows are short, so that a few tokens show everything.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from keel.models.heads import plain
from keel.models.positions import num_positions

LENGTHS = (12, 7)
"""Tokens of the rows of a trial: other lengths, and more than a short window has."""
WINDOW = 3
"""Tokens of a window within a trial."""
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
"""Settings, and attributes of layers, that limit which tokens a token attends to once a row is longer."""


@contextmanager
def trial(model: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows [B, L] of ordinary tokens and their mask [B, L], True = token, to be read exactly and with short windows."""
    model = plain(model)
    with torch.no_grad(), _in_float32(model), _short_windows(model):
        yield _rows(model)


def close(states: Tensor, others: Tensor) -> bool:
    """Whether states differ by the rounding of float32 alone; numbers that are none never do."""
    largest = max(1.0, float(others.abs().max()))
    return states.shape == others.shape and torch.allclose(states, others, rtol=1e-3, atol=1e-4 * largest)


def _rows(model: Any) -> tuple[Tensor, Tensor]:
    """Tokens from the middle of the vocabulary that the config gives no meaning."""
    config = model.config.get_text_config()
    named = {value for name, value in _settings(model.config) if name.endswith(("_id", "_index"))}
    middle = range(config.vocab_size // 3, config.vocab_size)
    ordinary = [token for token in chain(middle, range(config.vocab_size)) if token not in named][: sum(LENGTHS)]
    width = min(max(LENGTHS), num_positions(model) or max(LENGTHS))
    tokens = torch.tensor(ordinary, device=model.device).repeat(len(LENGTHS) * width)[: len(LENGTHS) * width]
    lengths = torch.tensor([width, min(min(LENGTHS), max(1, width - 1))], device=model.device)
    mask = torch.arange(width, device=model.device) >= width - lengths.unsqueeze(1)
    return tokens.view(len(LENGTHS), width), mask


def _settings(config: Any) -> Iterator[tuple[str, Any]]:
    for part in {id(config): config, id(config.get_text_config()): config.get_text_config()}.values():
        yield from ((name, value) for name, value in vars(part).items() if isinstance(value, int))


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """The same numbers in more places. The tensors themselves come back, so what shares memory shares it again."""
    kept = [
        (tensor, tensor.data)
        for tensor in chain(model.parameters(), model.buffers())
        if tensor.is_floating_point() and tensor.dtype.itemsize == 2
    ]
    try:
        for tensor, data in kept:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


@contextmanager
def _short_windows(model: nn.Module) -> Iterator[None]:
    """Windows of WINDOW tokens, in the configs, which masks and caches are made by, and in the layers.

    A window of all positions stays: no row leaves it, and in a shorter one Doge may not be causal.
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
