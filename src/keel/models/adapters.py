"""Low-rank adapters (LoRA, Hu et al. 2021) through peft: models that learn little, and share one frozen base."""

import copy
import json
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from keel.errors import ConfigError
from keel.models.heads import plain, trunk
from keel.models.pad_token import grow_embeddings

FILE = "adapter_config.json"


class Lora(Protocol):
    """What the adapter needs to know."""

    @property
    def r(self) -> int: ...
    @property
    def alpha(self) -> int: ...
    @property
    def target_modules(self) -> list[str] | str: ...


def with_lora(model: PreTrainedModel, lora: Lora, task: str) -> Any:
    """Wrap a model so that only a low-rank adapter learns, and of a classifier its head."""
    peft = _peft()
    targets = list(lora.target_modules) if not isinstance(lora.target_modules, str) else lora.target_modules
    settings = peft.LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0, task_type=task
    )
    return peft.get_peft_model(model, settings).eval()


def share_frozen(model: Any, base: Any) -> None:
    """Let the frozen trunk weights of `model` that equal those of `base` be the same memory.

    So one base carries the adapters of policy, critic and reward model, and each stays a model of its own.
    """
    found = {_bare(name): weight for name, weight in trunk(base).named_parameters() if not weight.requires_grad}
    for name, weight in trunk(model).named_parameters():
        twin = found.get(_bare(name))
        if twin is None or weight.requires_grad or (weight.shape, weight.dtype) != (twin.shape, twin.dtype):
            continue
        if torch.equal(weight, twin):
            weight.data = twin.data


def merged(model: Any) -> PreTrainedModel:
    """The model without peft: a copy with the adapter merged in, or the model itself."""
    if not hasattr(model, "merge_and_unload"):
        return model
    return copy.deepcopy(model).merge_and_unload()


def save_adapter(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The adapter alone, with config and tokenizer; the weights it belongs to stay where they are."""
    for settings in model.peft_config.values():
        base = Path(settings.base_model_name_or_path)
        settings.base_model_name_or_path = str(base.resolve() if base.exists() else base)
    model.save_pretrained(folder, save_embedding_layers=False)  # a pad token that was added has nothing to be saved
    plain(model).config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def is_adapter(folder: Path) -> bool:
    return (folder / FILE).is_file()


def base_of(folder: Path) -> str:
    """Folder or hub id of the model that an adapter was trained on. Raises ConfigError when it does not say."""
    base = json.loads((folder / FILE).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ConfigError("the adapter does not say which model it adapts", where=str(folder / FILE))
    return str(base)


def put_on(model: PreTrainedModel, folder: Path) -> Any:
    """The saved adapter on its base, frozen; what keel knows of the whole model lies in the adapter's own config."""
    if not (folder / "adapter_model.safetensors").is_file():
        raise ConfigError("the adapter has no adapter_model.safetensors", str(folder), "save it as safetensors")
    if (folder / "config.json").is_file():
        model.config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        grow_embeddings(model, model.config.get_text_config().vocab_size)
    return _peft().PeftModel.from_pretrained(model, folder).eval()


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ConfigError("lora needs the package peft", fix="pip install peft") from None
    return peft


def _bare(name: str) -> str:
    """A weight's name without what peft puts in between."""
    return name.replace(".base_layer.", ".")
