"""Run the layers of Llama-like models directly, in fewer and larger operations than their modules.

The linear maps of the modules are called, so that biases, adapters and hooks on them work. The rest has its gradients
written out, in compiled kernels if they are available. This saves passes over memory, which limit a small model's
speed on a CPU. In bfloat16, they round only what linear maps read and return: the sum over the layers is float32.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers.activations import SiLUActivation
from transformers.modeling_layers import GradientCheckpointingLayer

from keel import kernels
from keel.errors import ConfigError

TRUNKS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
"""Trunks whose layers are RMS norm, rotary attention, RMS norm and a gated linear unit, and nothing else."""

SILU = (nn.SiLU, SiLUActivation)

FEW_ROWS = 64
"""Largest number of rows for the compiled linear map. With more rows, torch's takes as long on one thread."""
LEAST_INPUTS = 128
"""Smallest number of inputs for the compiled linear map. It also needs 8 inputs for each row. With fewer, most of its
time goes into sums across registers, one for each number of the result."""

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Layer index, query [..., heads, D], key and value [..., kv_heads, D], not yet rotated -> [..., heads, D]"""


def has_known_layers(trunk: Any) -> bool:
    """Return whether `run_layers` computes what the modules of this trunk compute."""
    rope = (getattr(trunk.config, "rope_parameters", None) or {}).get("rope_type", "default")
    near_only = getattr(trunk.config, "sliding_window", None) is not None
    known = type(trunk).__name__ in TRUNKS and len(trunk.layers) > 0
    return known and rope in ("default", "linear", "llama3", "yarn") and not near_only


def rotations(trunk: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine for positions, of the first half of a head. [...] -> [..., 1, D / 2], [..., 1, D / 2]

    Those of the second half are the same.
    """
    like = widen_states(trunk.embed_tokens.weight[:0])  # the type of the result
    cos, sin = trunk.rotary_emb(like, positions.reshape(1, -1))
    half = cos.shape[-1] // 2
    shape = (*positions.shape, 1, half)
    return cos[0, :, :half].reshape(shape).contiguous(), sin[0, :, :half].reshape(shape).contiguous()


def run_layers(trunk: Any, tokens: Tensor, attend: Attend) -> Tensor:
    """Return the hidden states of tokens after the last norm. [...] -> [..., H]"""
    hidden = widen_states(trunk.embed_tokens(tokens))
    recompute = getattr(trunk, "recompute", False) and torch.is_grad_enabled()
    for index, layer in enumerate(trunk.layers):
        run = getattr(layer, "_run", None) or partial(run_layer, layer)  # a sharded layer gathers its weights in `_run`
        arguments = index, hidden, attend
        hidden = checkpoint(run, *arguments, use_reentrant=False) if recompute else run(*arguments)
    return apply_rms_norm(trunk.norm, hidden)


def lightweight_layers(trunk: Any, dtype: torch.dtype | None = None) -> Any:
    """Return namespaces with the weights of a trunk, for many small passes without gradients.

    They avoid the calls and attribute lookups of modules, which take as long as a small linear map.

    Args:
        dtype: of the hidden states, if it is not that of the weights. Linear maps still round their inputs.
    """
    compute = trunk.embed_tokens.weight.dtype
    names = partial(_names, formats=None if dtype in (None, compute) else Formats(compute, dtype))
    layers = [names(layer, self_attn=names(layer.self_attn), mlp=names(layer.mlp)) for layer in trunk.layers]
    return names(trunk, layers=layers)


def apply_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute a linear map without gradients. [..., in], [out, in], [out] -> [..., out]

    The result has the type of x, which is rounded to that of the weight.
    """
    size = x.shape[-1]
    pays = size >= LEAST_INPUTS and x.numel() <= min(FEW_ROWS, size // 8) * size and weight.shape[1] == size
    if kernels.available(x, narrow=(weight,) if bias is None else (weight, bias)):
        if pays:
            return kernels.linear(x, weight, bias)
        if weight.dtype is torch.bfloat16:  # torch would round the result, for few rows and many differently
            return kernels.product(x, weight, bias)
    return linear(x.to(weight.dtype), weight, bias).to(x.dtype)


class Formats(NamedTuple):
    """Number formats of a pass whose hidden states are wider than the inputs of its linear maps."""

    linear: torch.dtype
    states: torch.dtype


def _names(module: nn.Module, formats: Formats | None, **parts: Any) -> SimpleNamespace:
    attributes = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    weights: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    if formats:
        weights = {name: weight.to(formats.states) for name, weight in weights.items()}
    children = {n: _lightweight_child(child, formats) for n, child in module.named_children() if n not in parts}
    return SimpleNamespace(**attributes, **weights, **children, **parts)


def _lightweight_child(child: nn.Module, formats: Formats | None) -> Any:
    if hasattr(child, "variance_epsilon"):
        return _names(child, formats)
    apply = apply_without_gradients(child)
    if formats is None or apply is not child or next(child.parameters(), None) is None:
        return apply
    if isinstance(child, nn.Embedding):
        return lambda tokens: child(tokens).to(formats.states)
    return lambda x: child(x.to(formats.linear)).to(formats.states)


def apply_without_gradients(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the fastest function that computes a linear map without gradients, or the module if it is another one."""
    # Hooks, subclasses such as peft's layers, and a `forward` of one module work only through the call of the module.
    is_changed = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    if type(module) is nn.Linear and not is_changed:
        return partial(apply_linear, weight=module.weight, bias=module.bias)
    return module


def layer_table(trunk: Any) -> kernels.LayerTable | None:
    """Return the layers for the compiled code, or None if it cannot run them.

    It runs no adapters, hooks or other activations, and its layers have equal shapes, one type and one epsilon.
    """
    attention, maps = trunk.layers[0].self_attn, [_linear_maps(layer) for layer in trunk.layers]
    if not all(_is_plain(layer) for layer in trunk.layers):
        return None
    shapes = {tuple(each.weight.shape for each in of_layer) for of_layer in maps}
    types = {each.weight.dtype for of_layer in maps for each in of_layer}
    epsilons = {module.variance_epsilon for module in trunk.modules() if hasattr(module, "variance_epsilon")}
    if max(map(len, (shapes, types, epsilons))) > 1:
        return None
    layers = [
        kernels.Layer(
            layer.input_layernorm.weight.float(),
            layer.post_attention_layernorm.weight.float(),
            _norm_weight(layer.self_attn, "q_norm"),
            _norm_weight(layer.self_attn, "k_norm"),
            *[_as_map(each) for each in of_layer],
        )
        for layer, of_layer in zip(trunk.layers, maps, strict=True)
    ]
    heads = trunk.config.num_attention_heads, trunk.config.num_key_value_heads, attention.head_dim
    return kernels.LayerTable(layers, *heads, attention.scaling, trunk.norm.variance_epsilon)


def _as_map(layer: Any) -> kernels.Map:
    bias = None if layer.bias is None else layer.bias.float().contiguous()
    return kernels.Map(layer.weight.contiguous(), bias)


def _norm_weight(attention: Any, name: str) -> Tensor | None:
    norm = getattr(attention, name, None)
    return None if norm is None else norm.weight.float()


def _linear_maps(layer: Any) -> list[Any]:
    attention, unit = layer.self_attn, layer.mlp
    projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*projections, unit.gate_proj, unit.up_proj, unit.down_proj]


def _is_plain(layer: Any) -> bool:
    maps = _linear_maps(layer)
    is_linear = all(isinstance(apply_without_gradients(each), partial) for each in maps)
    return is_linear and isinstance(layer.mlp.act_fn, SILU) and kernels.available(narrow=[each.weight for each in maps])


def recompute_layers(trunk: Any) -> None:
    """Keep only the input of each layer for the gradient, and compute the rest again (Chen et al. 2016).

    Raises ConfigError if the model's layers do not support it.
    """
    if has_known_layers(trunk):
        trunk.recompute = True
        return
    layers = [module for module in trunk.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        what = f"{type(trunk).__name__} cannot recompute its layers"
        raise ConfigError(what, fix="set gradient_checkpointing: false")
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def run_layer(layer: Any, index: int, hidden: Tensor, attend: Attend) -> Tensor:
    """Return the hidden states after a layer. [..., H] -> [..., H]"""
    hidden = hidden + _attention(layer, index, apply_rms_norm(layer.input_layernorm, hidden), attend)
    normed, mlp = apply_rms_norm(layer.post_attention_layernorm, hidden), layer.mlp
    output: Tensor = hidden + mlp.down_proj(gate_activation(mlp.act_fn, mlp.gate_proj(normed), mlp.up_proj(normed)))
    return output


def _attention(layer: Any, index: int, normed: Tensor, attend: Attend) -> Tensor:
    attention = layer.self_attn
    query, key, value = (
        project(normed).unflatten(-1, (-1, attention.head_dim))
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "q_norm"):
        query, key = apply_rms_norm(attention.q_norm, query), apply_rms_norm(attention.k_norm, key)
    output: Tensor = attention.o_proj(attend(index, query, key, value).flatten(-2))
    return output


def widen_states(x: Tensor) -> Tensor:
    """Return states as the compiled kernels sum them: in float32. Those of linear maps stay as they are."""
    return x.float() if kernels.available(narrow=(x,)) else x


def apply_rms_norm(module: Any, x: Tensor) -> Tensor:
    """Compute the RMS norm. The result has the type of the module's weight if the compiled kernels compute it."""
    arguments = widen_states(x), module.weight, module.variance_epsilon
    normed: Tensor = RootMeanSquareNorm.apply(*arguments) if torch.is_grad_enabled() else _rms_norm(*arguments)[0]
    return normed


def gate_activation(activation: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """Compute activation(gate) * up."""
    if isinstance(activation, SILU) and gate.dtype == up.dtype and kernels.available(narrow=(gate, up)):
        product: Tensor = GatedUnit.apply(gate, up) if torch.is_grad_enabled() else kernels.silu_gate(gate, up)
    else:
        product = activation(gate) * up
    return product


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys [..., heads, D] by cosine and sine [..., 1, D / 2]."""
    rotated: Tensor = Rotation.apply(x, cos, sin) if torch.is_grad_enabled() else _rotate(x, cos, sin, 1.0)
    return rotated


class RootMeanSquareNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps), the mean over the last dimension (Zhang and Sennrich 2019)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, scale = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        if kernels.available(x, narrow=(weight, gradients[0])):
            return *kernels.rms_norm_back(x, weight, scale, gradients[0]), None
        scale = scale.unsqueeze(-1)
        gradient, normed = gradients[0], x * scale
        product = gradient * normed
        along = (product @ weight.to(product.dtype)).unsqueeze(-1) / x.shape[-1]
        for_x = torch.addcmul(gradient * weight, normed, along, value=-1).mul_(scale)
        for_weight = product.flatten(0, -2).sum(0)
        return for_x.to(x.dtype), for_weight.to(weight.dtype), None


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normed x and its scales 1 / sqrt(mean(x^2) + eps). [..., H], [H] -> [..., H], [...]"""
    if kernels.available(x, narrow=(weight,)):
        return kernels.rms_norm(x, weight, eps)
    wide = x.float() if x.dtype.itemsize < 4 else x
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(weight), scale.squeeze(-1)


class GatedUnit(torch.autograd.Function):
    """silu(gate) * up (Shazeer 2020). The backward pass computes the sigmoid again instead of storing it."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return kernels.silu_gate(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return kernels.silu_gate_back(gate, up, gradients[0])


class Rotation(torch.autograd.Function):
    """Rotary embedding (Su et al. 2021).

    Entries d and d + D / 2 of a head are a point, which rotates by an angle. Gradients rotate back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(gradients[0], cos, sin, -1.0), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    rotated = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    left, right = rotated.chunk(2, dim=-1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=right).addcmul_(first, sin, value=sign)
    return rotated
