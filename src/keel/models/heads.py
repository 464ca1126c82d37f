"""The heads of a trunk: logits of the next token, and values of states."""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from keel import kernels
from keel.core.logprobs import logprobs_and_entropy
from keel.errors import ConfigError
from keel.models.layers import FEW_ROWS, apply_without_gradients

LOGITS_KEPT = 2**25
"""Largest number of logits that are kept for the gradient (128 MiB). More are computed in chunks, and again in the
backward pass."""
LOGITS_AT_ONCE = {"cpu": 2**21, "cuda": 2**27}
"""Logits per chunk: few enough for a CPU's cache, and enough to use all of a GPU."""
ROWS_AT_ONCE = 256
"""Smallest number of tokens per chunk, since each chunk reads the full output matrix, and adds to all of its gradient.
With 49,152 tokens in the vocabulary and states of 576, chunks of 42 take twice as long as chunks of 256 on a CPU."""

UNFIT = (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError, AssertionError, StopIteration)
"""Errors that the code of a model raises when it is used in a way that it does not support."""


def unwrap_model(model: Any) -> PreTrainedModel:
    """Return the transformers model inside a peft wrapper, with its adapter layers, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def compute_dtype(model: Any) -> torch.dtype:
    """Return the number format in which a model computes. The trained weights of a sharded model are float32."""
    base: Any = unwrap_model(model)
    dtype: torch.dtype = getattr(base, "keel_compute_dtype", None) or base.get_input_embeddings().weight.dtype
    return dtype


def trunk(model: Any) -> nn.Module:
    """Return the part of a model that turns tokens into hidden states.

    If the model has none under the name that its class gives (Llama 4's text model), return the part that holds the
    embeddings.
    """
    model = unwrap_model(model)
    if model.base_model is not model or model.get_output_embeddings() is None:
        return model.base_model
    embeddings = model.get_input_embeddings()
    parts = [part for part in model.children() if any(module is embeddings for module in part.modules())]
    return parts[0] if len(parts) == 1 and parts[0] is not embeddings else model


def position_arguments(model: Any, mask: Tensor) -> dict[str, Tensor]:
    """Return the argument `position_ids` [B, L], which counts real tokens only; empty for models without positions."""
    if "position_ids" not in inspect.signature(trunk(model).forward).parameters:
        return {}
    return {"position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)}


def next_token_logits(model: Any, hidden: Tensor) -> Tensor:
    """Compute logits of the next token from hidden states. [..., H] -> [..., V]

    Some architectures have more than an output matrix: a scale after it (Granite, Cohere), a soft cap after it
    (Gemma 2), or a layer before it (BERT and related models).
    """
    model = unwrap_model(model)
    return (
        _logits_by_forward(model, hidden) if getattr(model, "keel_head_by_forward", False) else _logits(model, hidden)
    )


def _logits(model: Any, hidden: Tensor) -> Tensor:
    head = model.get_output_embeddings()
    apply: Any = apply_without_gradients(head)
    if apply is not head and head.weight.dtype is torch.bfloat16 and kernels.available(narrow=(hidden, head.weight)):
        logits: Tensor = WideLogits.apply(hidden, head.weight, head.bias)
    else:
        apply = head if torch.is_grad_enabled() else apply
        # State-space models return float32 states in any dtype. `apply_without_gradients` takes them as they are.
        logits = apply(hidden.to(head.weight.dtype) if apply is head else hidden)
    config = model.config.get_text_config()
    # Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`.
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    logits = logits if scale == 1 else logits * scale
    cap = getattr(config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


class WideLogits(torch.autograd.Function):
    """Logits in float32 from a bfloat16 matrix, whose products are exact in float32.

    Rounded to bfloat16, a logit of 20 has an error of up to 0.06, more than all that the layers round away.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        states = states.to(weight.dtype)
        ctx.save_for_backward(states, weight)
        ctx.has_bias = bias is not None
        apply = kernels.linear if states.numel() <= FEW_ROWS * states.shape[-1] else kernels.product
        return apply(states.float(), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        states, weight = ctx.saved_tensors
        gradient = gradients[0].to(weight.dtype).flatten(0, -2)
        for_states = (gradient @ weight).view(states.shape)
        for_weight = gradient.t() @ states.flatten(0, -2) if ctx.needs_input_grad[1] else None  # frozen with LoRA
        for_bias = gradient.sum(0) if ctx.has_bias else None
        return for_states, for_weight, for_bias


def _logits_by_forward(model: Any, hidden: Tensor) -> Tensor:
    """Compute the logits with the model's forward pass, in which these states replace those of its trunk."""
    # The shallow copy gets a new dictionary of modules, so that the model itself does not change.
    shell, original = copy.copy(model), trunk(model)
    shell._modules = {
        name: _FixedTrunk(hidden.reshape(1, -1, hidden.shape[-1])) if module is original else module
        for name, module in model._modules.items()
    }
    tokens = torch.zeros(1, hidden[..., 0].numel(), dtype=torch.int64, device=hidden.device)
    logits: Tensor = shell(input_ids=tokens, use_cache=False, return_dict=True).logits
    return logits.view(*hidden.shape[:-1], -1)


class _FixedTrunk(nn.Module):
    """A trunk that returns fixed states for any input."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, *_: Any, **__: Any) -> "_Output":
        return _Output((self.states,))


class _Output(tuple[Tensor, ...]):
    """The output of a trunk with hidden states only."""

    def __getattr__(self, name: str) -> Tensor | None:
        return self[0] if name == "last_hidden_state" else None


def token_statistics(
    model: Any, states: Tensor, tokens: Tensor, temperature: float = 1.0, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute the log-probability of each token in the state before it, and the entropy of that state.

    [N, H], [N] -> [N], [N]. Many states are multiplied by the output matrix in chunks, so that [N, V] is never in
    memory.
    """

    def statistics(states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return logprobs_and_entropy(next_token_logits(model, states), tokens, temperature, entropy_gradient)

    vocabulary = unwrap_model(model).config.get_text_config().vocab_size
    rows = max(ROWS_AT_ONCE, LOGITS_AT_ONCE[tokens.device.type] // vocabulary)
    if len(tokens) <= rows or (torch.is_grad_enabled() and len(tokens) * vocabulary <= LOGITS_KEPT):
        return statistics(states, tokens)
    chunks = zip(states.split(rows), tokens.split(rows), strict=True)
    results = [checkpoint(statistics, *chunk, use_reentrant=False) for chunk in chunks]
    logprobs, entropies = (torch.cat(each) for each in zip(*results, strict=True))
    return logprobs, entropies


@torch.no_grad()
def check_logits(model: Any) -> None:
    """Choose how `next_token_logits` computes the model's logits. Raises ConfigError if no way reproduces them."""
    model = unwrap_model(model)
    tokens = torch.tensor([[0, 1, 2, 1]], device=model.device)
    expected = model(input_ids=tokens, use_cache=False).logits
    states = trunk(model)(input_ids=tokens, use_cache=False).last_hidden_state
    for by_forward in (False, True):
        model.keel_head_by_forward = by_forward
        try:
            logits = next_token_logits(model, states)
        except UNFIT:
            continue
        if logits.shape == expected.shape and torch.allclose(expected.float(), logits.float(), atol=1e-3, rtol=1e-3):
            return
    raise ConfigError(
        f"{type(model).__name__} computes its logits in a way that keel does not support",
        fix="use another architecture, or report it",
    )


def new_value_head(model: Any) -> nn.Linear:
    """Return a value head for the trunk of `model`, with weights of zero, so that all states have the same value."""
    head = nn.Linear(unwrap_model(model).get_output_embeddings().weight.shape[1], 1, bias=False)
    nn.init.zeros_(head.weight)
    return head.to(device=unwrap_model(model).device, dtype=torch.float32)


def compute_values(head: nn.Module, hidden: Tensor) -> Tensor:
    """Compute values from hidden states, in float32 or wider. [..., H] -> [...]"""
    values = torch.squeeze_copy(head(hidden.to(next(head.parameters()).dtype)), -1)  # FSDP forbids views as outputs
    return values.float() if values.dtype.itemsize < 4 else values
