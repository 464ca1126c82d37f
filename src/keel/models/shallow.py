"""Models of few layers with random weights in the place of saved ones: what a run costs shows without their weights."""

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
from keel.models.files import is_adapter, read_part, refusing
from keel.models.trunk_classifier import SequenceClassifier

BLOCK = 1_000_003
"""Random numbers that are drawn for a tensor before they repeat. A prime: no two rows of a matrix are equal."""
_depths: dict[str, int] = {}


@contextmanager
def shallow_models(depths: Mapping[str, int]) -> Iterator[None]:
    """Inside, each of these folders and hub ids is loaded as a random model with so many layers."""
    _depths.update(depths)
    try:
        yield
    finally:
        _depths.clear()


def is_shallow(name: str) -> bool:
    """Whether a random model is loaded for this folder or hub id."""
    return name in _depths


def shallow_model(auto_class: Any, name: str, dtype: torch.dtype) -> Any:
    """Return a random model like the one that a folder or hub id holds; the base for an adapter.

    Two models of one name have the same weights, as two copies of a file have.
    """
    config = model_config(name, auto_class)
    truncate(config.get_text_config(), _depths[name])
    with torch.random.fork_rng(devices=[]), _RepeatedDraws():
        torch.manual_seed(zlib.crc32(name.encode()))
        model = auto_class.from_config(config, dtype=dtype)
    base = Path(adapter_base(Path(name)) if is_adapter(Path(name)) else name)
    if (base / "generation_config.json").is_file():  # it may hold the only end token
        with refusing(str(base), "generation config"):
            model.generation_config = GenerationConfig.from_pretrained(base)
    return model


class _RepeatedDraws(TorchFunctionMode):
    """Inside, large tensors are filled with copies of one block of random numbers.

    A probe would otherwise spend much of its time on numbers that no cost depends on, those of embeddings above all.
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
    """The config of a model, or of the base of an adapter. Raises ConfigError when there is none."""
    if is_adapter(Path(name)):
        return model_config(adapter_base(Path(name)), auto_class)
    labels = {"num_labels": 1} if auto_class is SequenceClassifier else {}
    return read_part(AutoConfig, name, "config", **labels)


def truncate(config: Any, layers: int) -> None:
    """Set the number of layers of a text config, and shorten its per-layer lists to match."""
    count = config.num_hidden_layers
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == count:
            setattr(config, key, value[:layers])
    config.num_hidden_layers = layers
