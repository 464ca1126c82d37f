"""Check that a model to train has gradients in evaluation mode, in which keel trains so that dropout is off."""

from typing import Any

import torch

from keel.errors import ConfigError
from keel.models.heads import UNFIT, trunk, unwrap_model
from keel.models.layers import has_known_layers
from keel.models.positions import num_positions
from keel.models.sameness import probe_tokens

TOKENS = 130
"""Length of the row of the check: more than a chunk of linear attention (xLSTM fails in bfloat16 after 64 tokens)."""


def require_gradients(model: Any, where: str) -> None:
    """Raise ConfigError if the model's code fails to compute a gradient of the hidden states.

    Reformer's layers, for example, raise in evaluation mode and have no gradients for adapters.
    """
    first = next((weight for weight in unwrap_model(model).parameters() if weight.requires_grad), None)
    if first is None or has_known_layers(trunk(model)):
        return
    row = probe_tokens(model)[0].repeat(TOKENS)[: min(TOKENS, num_positions(model) or TOKENS)]
    try:
        with torch.enable_grad():
            states = trunk(model)(input_ids=row.unsqueeze(0), use_cache=False).last_hidden_state
            torch.autograd.grad(states.sum(), [first], allow_unused=True)
    except UNFIT as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        kind, dtype = type(unwrap_model(model)).__name__, str(first.dtype).removeprefix("torch.")
        what = f"{kind} has no gradients in {dtype} and evaluation mode, in which keel trains: {reason}"
        raise ConfigError(what, where=where, fix="use another dtype or architecture") from error
