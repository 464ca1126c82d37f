"""What sits on a trunk: logits of the next token, and values of states."""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from keel.core.logprobs import logprobs_and_entropy
from keel.errors import ConfigError

LOGITS_KEPT = 2**24
"""Most logits whose probabilities are kept for the gradient; more go in chunks, and are computed once again for it."""
LOGITS_AT_ONCE = {"cpu": 2**21, "cuda": 2**27}
"""Size of such a chunk: it stays in a CPU's cache; a GPU it has to fill."""
ROWS_AT_ONCE = 32
"""Fewest tokens of a chunk: each chunk also goes once through the gradient of the whole output matrix."""

UNFIT = (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError, AssertionError, StopIteration)
"""What the code of a model raises that is used in a way it does not know."""


def plain(model: Any) -> PreTrainedModel:
    """The transformers model inside a peft wrapper (adapter layers included), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trunk(model: Any) -> nn.Module:
    """The part of a model that turns tokens into hidden states.

    Of a model without one under the name that its class gives (Llama 4's text model), the part with the embeddings.
    """
    model = plain(model)
    if model.base_model is not model or model.get_output_embeddings() is None:
        return model.base_model
    embeddings = model.get_input_embeddings()
    parts = [part for part in model.children() if any(module is embeddings for module in part.modules())]
    return parts[0] if len(parts) == 1 and parts[0] is not embeddings else model


def position_arguments(model: Any, mask: Tensor) -> dict[str, Tensor]:
    """The argument `position_ids` [B, L] that counts real tokens only; nothing for models that know no positions."""
    if "position_ids" not in inspect.signature(trunk(model).forward).parameters:
        return {}
    return {"position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)}


def next_token_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits of the next token from hidden states [..., H] -> [..., V], with what some architectures do after the
    output matrix (Granite, Cohere: a scale; Gemma 2: a soft cap; BERT and its kin: a layer before it)."""
    model = plain(model)
    return (
        _logits_by_forward(model, hidden) if getattr(model, "keel_head_by_forward", False) else _logits(model, hidden)
    )


def _logits(model: Any, hidden: Tensor) -> Tensor:
    head = model.get_output_embeddings()
    logits: Tensor = head(hidden.to(head.weight.dtype))  # residuals of state-space models are float32
    config = model.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    logits = logits if scale == 1 else logits * scale
    cap = getattr(config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


def _logits_by_forward(model: Any, hidden: Tensor) -> Tensor:
    """The same by the model's own code, which is handed the states in place of its trunk's."""
    shell, read = copy.copy(model), trunk(model)
    shell._modules = {
        name: _Given(hidden.reshape(1, -1, hidden.shape[-1])) if part is read else part
        for name, part in model._modules.items()
    }
    tokens = torch.zeros(1, hidden[..., 0].numel(), dtype=torch.int64, device=hidden.device)
    logits: Tensor = shell(input_ids=tokens, use_cache=False, return_dict=True).logits
    return logits.view(*hidden.shape[:-1], -1)


class _Given(nn.Module):
    """Stands for a trunk and returns the states that it was made with, whatever it is called with."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, *_: Any, **__: Any) -> "_Output":
        return _Output((self.states,))


class _Output(tuple[Tensor, ...]):
    """The output of a trunk that returns its states and nothing else."""

    def __getattr__(self, name: str) -> Tensor | None:
        return self[0] if name == "last_hidden_state" else None


def token_statistics(
    model: Any, states: Tensor, tokens: Tensor, temperature: float = 1.0, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token in the state before it, and that state's entropy. [N, H], [N] -> [N], [N]

    The states meet the output matrix a chunk at a time: [N, V] never exists.
    """

    def statistics(states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return logprobs_and_entropy(next_token_logits(model, states), tokens, temperature, entropy_gradient)

    vocabulary = plain(model).config.get_text_config().vocab_size
    rows = max(ROWS_AT_ONCE, LOGITS_AT_ONCE[tokens.device.type] // vocabulary)
    if len(tokens) <= rows or (torch.is_grad_enabled() and len(tokens) * vocabulary <= LOGITS_KEPT):
        return statistics(states, tokens)
    parts = zip(states.split(rows), tokens.split(rows), strict=True)
    found = [checkpoint(statistics, *part, use_reentrant=False) for part in parts]
    logprobs, entropies = (torch.cat(each) for each in zip(*found, strict=True))
    return logprobs, entropies


@torch.no_grad()
def check_logits(model: Any) -> None:
    """Find out how hidden states become the model's own logits. Raises ConfigError if no way reproduces them."""
    model = plain(model)
    tokens = torch.tensor([[0, 1, 2, 1]], device=model.device)
    own = model(input_ids=tokens, use_cache=False).logits
    states = trunk(model)(input_ids=tokens, use_cache=False).last_hidden_state
    for by_forward in (False, True):
        model.keel_head_by_forward = by_forward
        try:
            ours = next_token_logits(model, states)
        except UNFIT:
            continue
        if ours.shape == own.shape and torch.allclose(own.float(), ours.float(), atol=1e-3, rtol=1e-3):
            return
    raise ConfigError(
        f"{type(model).__name__} computes its logits in a way that keel does not know",
        fix="use another architecture, or report it",
    )


def new_value_head(model: Any) -> nn.Linear:
    """Return a value head for the trunk of `model`, zero at the start so that all states have one value."""
    head = nn.Linear(plain(model).get_output_embeddings().weight.shape[1], 1, bias=False)
    nn.init.zeros_(head.weight)
    return head.to(device=plain(model).device, dtype=torch.float32)


def compute_values(head: nn.Module, hidden: Tensor) -> Tensor:
    """Values from hidden states, in float32 or better. [..., H] -> [...]"""
    values = head(hidden.to(next(head.parameters()).dtype)).squeeze(-1)
    return values.float() if values.dtype.itemsize < 4 else values
