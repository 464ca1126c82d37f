"""Linear layers with frozen weights of 4 or 8 bits, through bitsandbytes (QLoRA, Dettmers et al. 2023).

The product is that of the dequantized weights, in the number format of the input. So a model whose adapter is merged
into the dequantized weights computes what was trained. The linear layers of bitsandbytes do not have this property:
Linear8bitLt also quantizes the input in evaluation mode, in which keel trains. Linear4bit repacks its weights after a
pass without gradients, on CPUs with bfloat16 instructions, and then has no gradients anymore.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from keel.errors import ConfigError
from keel.models.heads import UNFIT, trunk, unwrap_model
from keel.models.layers import has_known_layers
from keel.models.sameness import outputs

BLOCK = 64
"""Number of NF4 weights that share a scale."""
SCALES = 256
"""Number of NF4 scales that share a scale of their 8-bit form (double quantization)."""
KEY = "keel_quantization"
"""Key in the config of a model with quantized layers, which is saved with its adapter."""


class QuantizedLinear(nn.Linear):
    """A linear layer with frozen quantized weights. peft adapts it like any other linear layer."""

    def __init__(self, layer: nn.Linear, **packed: Tensor) -> None:
        nn.Module.__init__(self)  # nn.Linear would allocate the weights
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias: Any = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
        for name, tensor in packed.items():
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weights [out_features, in_features]."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return self.multiply(input, bias)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product with the dequantized weights, plus the bias. [..., in_features] -> [..., out_features]"""
        raise NotImplementedError


class NF4Linear(QuantizedLinear):
    """Weights in 4-bit NormalFloat, with double quantization: 4.13 bits each."""

    absmax: nn.Parameter
    scales: nn.Parameter
    offset: nn.Parameter
    code: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        functional = import_bitsandbytes().functional
        weight = layer.weight.detach()
        packed, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
        # quantize_4bit would do the rest too, but it keeps the code of its first call, even if that is on meta.
        code, offset = _scale_code().to(weight.device), state.absmax.mean()
        absmax, scales = functional.quantize_blockwise(state.absmax - offset, code=code, blocksize=SCALES)
        super().__init__(layer, weight=packed, absmax=absmax, scales=scales.absmax, offset=offset)
        self.register_buffer("code", code, persistent=False)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        weight: Tensor = import_bitsandbytes().functional.dequantize_4bit(self.weight.data, self._state(dtype))
        return weight

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        product: Tensor = import_bitsandbytes().matmul_4bit(x, self.weight.data, self._state(x.dtype), bias=bias)
        return product

    def _state(self, dtype: torch.dtype) -> Any:
        """Describe the packed weights to bitsandbytes. It is made for each call, since the tensors may move."""
        state_class = import_bitsandbytes().functional.QuantState
        scales = state_class(self.scales.data, code=self.code, blocksize=SCALES, dtype=torch.float32)
        shape = torch.Size((self.out_features, self.in_features))
        settings = {"shape": shape, "blocksize": BLOCK, "quant_type": "nf4", "dtype": dtype}
        return state_class(self.absmax.data, **settings, offset=self.offset.data, state2=scales)


class Int8Linear(QuantizedLinear):
    """Weights in 8 bits, with one scale for each row."""

    scales: nn.Parameter

    def __init__(self, layer: nn.Linear) -> None:
        weight = layer.weight.detach().to(torch.float16)
        packed, scales, _ = import_bitsandbytes().functional.int8_vectorwise_quant(weight)
        super().__init__(layer, weight=packed, scales=scales / 127)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return (self.weight.data * self.scales.data.unsqueeze(1)).to(dtype)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        product: Tensor = _Product.apply(x, self)
        return product if bias is None else product + bias


class _Product(torch.autograd.Function):
    """The product with the weights of a layer, which are dequantized again for the gradient instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return linear(x, layer.dequantize(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.layer.dequantize(gradients[0].dtype), None


LAYERS: dict[str, Callable[[nn.Linear], QuantizedLinear]] = {"nf4": NF4Linear, "int8": Int8Linear}


@cache
def import_bitsandbytes() -> Any:
    """Import bitsandbytes. Raises ConfigError if it is not installed."""
    # On a CPU with bfloat16 instructions, it warns that it cannot download a kernel, which keel does not use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError:
        fix = "pip install 'keel-rlhf[quantization]', or remove quantization"
        raise ConfigError("quantization needs the package bitsandbytes", where="quantization", fix=fix) from None
    return bitsandbytes


@cache
def _scale_code() -> Tensor:
    """Return the 256 values of a scale in 8 bits, which all layers share. [256]"""
    with torch.device("cpu"):  # the caller may build a model on meta
        code: Tensor = import_bitsandbytes().functional.create_dynamic_map()
    return code


def quantize_model(model: Any, quantization: str, unquantized: Collection[str] = ()) -> None:
    """Quantize the linear layers of a model's trunk in place, one after the other.

    The embeddings, norms and heads keep their weights, and so do layers that share their weights.

    Args:
        quantization: "nf4" or "int8".
        unquantized: names of more layers that keep their weights.

    Raises ConfigError if the model has no layer to quantize, or does not compute with quantized layers.
    """
    import_bitsandbytes()
    base: Any = unwrap_model(model)
    kept = {*shared_linear_layers(base), *unquantized}
    layers = {id(layer) for name, layer in base.named_modules() if type(layer) is nn.Linear and name not in kept}
    layers &= {id(module) for module in trunk(base).modules()} - {id(base.get_output_embeddings())}
    if not layers:
        what = f"{type(base).__name__} has no linear layers that can be quantized"
        raise ConfigError(what, where="quantization", fix="remove it, or use another architecture")
    _replace_layers(base, layers, LAYERS[quantization])
    for weight in base.parameters():  # a weight that is read from a mapped file would keep the full file in memory
        weight.data = weight.data.clone()
    setattr(base.config, KEY, quantization)
    if not has_known_layers(trunk(base)) and base.device.type != "meta":
        _require_outputs(base)


def dequantize_model(model: Any) -> None:
    """Replace quantized layers by linear layers with the dequantized weights, in the model's number format."""
    base: Any = unwrap_model(model)

    def dequantize(layer: QuantizedLinear) -> nn.Linear:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(layer.dequantize(base.dtype), requires_grad=False)
        plain.bias = layer.bias
        return plain.eval()

    _replace_layers(base, {id(layer) for layer in base.modules() if isinstance(layer, QuantizedLinear)}, dequantize)
    vars(base.config).pop(KEY, None)


def quantization_name(model: Any) -> str | None:
    """Return the setting `quantization` of a model with quantized layers, or None."""
    return getattr(unwrap_model(model).config, KEY, None)


def shared_linear_layers(model: Any) -> set[str]:
    """Return the names of linear layers that share their weights (Zamba)."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    uses = Counter(layer.weight.data_ptr() for layer in layers.values() if not layer.weight.is_meta)
    return {name for name, layer in layers.items() if uses[layer.weight.data_ptr()] > 1}


def _replace_layers(model: nn.Module, layers: Collection[int], make: Callable[[Any], nn.Module]) -> None:
    """Replace layers wherever they are used. The memory of a layer is free before the next one is replaced.

    Args:
        layers: their `id`, since references would keep them in memory.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if id(child) in layers:
                places.setdefault(id(child), []).append((parent, name))
    for uses in places.values():
        parent, name = uses[0]
        new = make(getattr(parent, name))
        for parent, name in uses:
            setattr(parent, name, new)


def _require_outputs(model: Any) -> None:
    """Raise ConfigError for a model that reads the weights of its layers instead of calling the layers."""
    try:
        outputs(model)
    except UNFIT as error:
        what = f"{type(model).__name__} does not compute with quantized layers: {' '.join(str(error).split())[:200]}"
        raise ConfigError(what, where="quantization", fix="remove it, or use another architecture") from error
