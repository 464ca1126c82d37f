"""Decoding through the forward pass of any causal model, with its cache or, if that loses information, without."""

import inspect
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from keel.models.heads import UNFIT, position_arguments, trunk, unwrap_model
from keel.models.packed import reads_single_rows, token_states
from keel.models.trial import states_agree, trial


class ModuleDecoder:
    """Decodes with the forward pass and the cache of the model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        names = inspect.signature(trunk(model).forward).parameters
        self.cache_name = "cache_params" if "cache_params" in names else "past_key_values"

    def start(self, tokens: Tensor, mask: Tensor, copies: int) -> Tensor:
        self.cache: Any = DynamicCache(config=unwrap_model(self.model).config)
        self.mask = mask.long()
        states = self._forward(tokens, position_arguments(self.model, self.mask))
        if copies > 1:
            rows = torch.arange(len(mask), device=mask.device).repeat_interleave(copies)
            self.keep(rows)
            states = states[rows]
        return states

    def advance(self, tokens: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        positions = {name: every[:, -1:] for name, every in position_arguments(self.model, self.mask).items()}
        return self._forward(tokens.unsqueeze(1), positions)

    def keep(self, rows: Tensor) -> None:
        self.cache.reorder_cache(rows)  # all kinds of cache layers have it, unlike batch_select_indices
        self.mask = self.mask[rows]

    def _forward(self, tokens: Tensor, positions: dict[str, Tensor]) -> Tensor:
        # State-space models take a mask of the new tokens, others a mask of all tokens that these attend to.
        mask = self.mask[:, -tokens.shape[1] :] if self.cache_name == "cache_params" else self.mask
        output = trunk(self.model)(
            input_ids=tokens,
            attention_mask=mask,
            use_cache=True,
            **{self.cache_name: self.cache},
            **positions,
        )
        states: Tensor = output.last_hidden_state[:, -1]
        return states


class FullDecoder:
    """Decodes by reading all tokens of a row again for each new token. Its time grows with the square of the length.

    For models whose cache does not hold their full state, cannot be reduced to some rows, or depends on the padding.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def start(self, tokens: Tensor, mask: Tensor, copies: int) -> Tensor:
        self.tokens, self.mask = tokens, mask
        states = self._last_states()
        self.tokens, self.mask = (x.repeat_interleave(copies, 0) for x in (tokens, mask))
        return states.repeat_interleave(copies, 0)

    def advance(self, tokens: Tensor) -> Tensor:
        self.tokens = torch.cat([self.tokens, tokens.unsqueeze(1)], dim=1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        return self._last_states()

    def keep(self, rows: Tensor) -> None:
        self.tokens, self.mask = self.tokens[rows], self.mask[rows]

    def _last_states(self) -> Tensor:
        return token_states(self.model, self.tokens, self.mask)[self.mask.sum(1).cumsum(0) - 1]


_cache_works: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def module_decoder(model: Any) -> ModuleDecoder | FullDecoder:
    """Return a decoder that uses the model's cache, if a trial shows that it gives the states of the full pass.

    The trial is run once per model.
    """
    if unwrap_model(model) not in _cache_works:
        _cache_works[unwrap_model(model)] = not reads_single_rows(model) and _try_cache(model)
    return ModuleDecoder(model) if _cache_works[unwrap_model(model)] else FullDecoder(model)


def _try_cache(model: Any) -> bool:
    with trial(model) as (tokens, mask):
        try:
            cached, full = (_trial_states(kind(model), tokens, mask) for kind in (ModuleDecoder, FullDecoder))
            return states_agree(cached, full)
        except UNFIT:  # the model has a cache of another kind, or one that cannot be reduced to some rows
            return False


def _trial_states(decoder: ModuleDecoder | FullDecoder, tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the states of rows that are repeated, grow beyond a short window, and end. -> [rows, H]"""
    read, others = tokens[:, :-3], tokens[:, -3:].repeat_interleave(2, 0)
    states = [decoder.start(read, mask[:, :-3], copies=2), decoder.advance(others[:, 0])]
    rows = torch.tensor([3, 1, 2], device=tokens.device)
    decoder.keep(rows)
    for column in (1, 2):
        states.append(decoder.advance(others[rows, column]))
    return torch.cat(states)
