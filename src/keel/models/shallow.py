"""Load random models with few layers in place of saved ones, to measure the cost of a run without their weights."""

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, GenerationConfig

from keel.models.adapters import adapter_base
from keel.models.model_files import is_adapter, load_errors_converted, read_part
from keel.models.trunk_classifier import SequenceClassifier

BLOCK = 1_000_003
"""Number of random numbers of a tensor before they repeat. It is prime, so that no two rows of a matrix are equal."""
_depths: dict[str, int] = {}


@contextmanager
def shallow_models(depths: Mapping[str, int]) -> Iterator[None]:
    """Inside, these folders and hub ids are loaded as random models with these numbers of layers."""
    _depths.update(depths)
    try:
        yield
    finally:
        _depths.clear()


def is_shallow(name: str) -> bool:
    """Return whether a random model is loaded for this folder or hub id."""
    return name in _depths


def shallow_model(auto_class: Any, name: str, dtype: torch.dtype) -> Any:
    """Return a random model of the architecture of a folder or hub id. For an adapter, this is its base.

    Two models of the same name have the same weights, like two copies of a file.
    """
    config = model_config(name, auto_class)
    truncate(config.get_text_config(), _depths[name])
    with torch.random.fork_rng(devices=[]), _RepeatedDraws():
        torch.manual_seed(zlib.crc32(name.encode()))
        model = auto_class.from_config(config, dtype=dtype)
    base = Path(adapter_base(Path(name)) if is_adapter(Path(name)) else name)
    if (base / "generation_config.json").is_file():  # some models have their end token only here
        with load_errors_converted(str(base), "generation config"):
            model.generation_config = GenerationConfig.from_pretrained(base)
    return model


class _RepeatedDraws(TorchFunctionMode):
    """Inside, large tensors are filled with copies of one block of random numbers.

    Otherwise much of the time would go into random numbers, mostly of embeddings, which do not affect the cost.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        draws = function in (Tensor.normal_, Tensor.uniform_)
        if not draws or args[0].numel() <= BLOCK or not args[0].is_contiguous():
            return function(*args, **(kwargs or {}))
        flat = args[0].view(-1)
        function(flat[:BLOCK], *args[1:], **(kwargs or {}))
        for rest in flat[BLOCK:].split(BLOCK):
            rest.copy_(flat[: len(rest)])
        return args[0]


def model_config(name: str, auto_class: Any) -> Any:
    """Load the config of a model, or of an adapter's base. Raises ConfigError if there is none."""
    if is_adapter(Path(name)):
        return model_config(adapter_base(Path(name)), auto_class)
    labels = {"num_labels": 1} if auto_class is SequenceClassifier else {}
    return read_part(AutoConfig, name, "config of the model", **labels)


def truncate(config: Any, layers: int) -> None:
    """Set the number of layers of a text config, and shorten its lists with one entry per layer."""
    count = config.num_hidden_layers
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == count:
            setattr(config, key, value[:layers])
    config.num_hidden_layers = layers
