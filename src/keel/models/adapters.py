"""Low-rank adapters (LoRA, Hu et al. 2021) through peft: models that learn little, and share one frozen base."""

import copy
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from keel.errors import ConfigError
from keel.models.files import ADAPTER, is_adapter, refusing
from keel.models.heads import plain, trunk
from keel.models.pad_token import grow_embeddings
from keel.models.sameness import outputs, same
from keel.models.trial import trial
from keel.models.weights import refuse_missing
from keel.terminal import tell
from keel.world import World

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Of every weight's name in an adapter's file."""

STATE_SPACES = {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}
"""Families of which peft adapts no `out_proj`."""


class Lora(Protocol):
    """What the adapter needs to know."""

    @property
    def r(self) -> int: ...
    @property
    def alpha(self) -> int: ...
    @property
    def target_modules(self) -> list[str] | str: ...


def with_lora(model: PreTrainedModel, lora: Lora, task: str) -> Any:
    """Wrap a model so that only a low-rank adapter learns, and of a classifier its head and all else that is new."""
    peft = _peft()
    targets = list(lora.target_modules) if not isinstance(lora.target_modules, str) else lora.target_modules
    new = {key.rpartition(".")[0] for key in getattr(model, "keel_new", [])} - {"score", "classifier"}  # peft's own
    settings = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=targets,
        lora_dropout=0.0,
        task_type=task,
        modules_to_save=sorted(new) or None,
        exclude_modules=_unfit_layers(model) or None if targets == "all-linear" else None,
    )
    try:
        with _tied_is_known():
            wrapped = peft.get_peft_model(model, settings).eval()
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split()), where="lora.target_modules") from error
    untie_adapted_matrices(wrapped)
    return wrapped


def require_targets(model: PreTrainedModel, lora: Lora) -> None:
    """Raise ConfigError for a name in `target_modules` that no layer has: peft refuses them only where no name fits."""
    if isinstance(lora.target_modules, str):
        return
    names = [f".{name}" for name, _ in model.named_modules()]
    absent = [target for target in lora.target_modules if not any(name.endswith(f".{target}") for name in names)]
    if absent:
        linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        layers = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        what = f"the model has no layer {absent[0]!r}; its linear layers: {layers}"
        raise ConfigError(what, where="lora.target_modules", fix="correct the name, or leave it out")
    for name in sorted(_layers_of_one_memory(model)):
        if named := [target for target in lora.target_modules if f".{name}".endswith(f".{target}")]:
            what = f"{named[0]!r} names layers that share their weights, such as {name}"
            raise ConfigError(what, where="lora.target_modules", fix="leave it out, or set all-linear")


def _unfit_layers(model: PreTrainedModel) -> list[str]:
    """Linear layers that an adapter cannot stand for: those that return something else (Llama 4's router), those of
    state-space models whose weights are read past their forward pass, which peft refuses, and those that share their
    weights."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    past = {"out_proj"} if model.config.model_type in STATE_SPACES else set()
    unfit = {name for name in layers if name.rpartition(".")[2] in past} | _layers_of_one_memory(model)
    others = {name: layer for name, layer in layers.items() if type(layer).forward is not nn.Linear.forward}

    def note(name: str, output: Any) -> None:
        if not isinstance(output, torch.Tensor):
            unfit.add(name)

    hooks = [
        layer.register_forward_hook(lambda _, __, output, name=name: note(name, output))
        for name, layer in others.items()
    ]
    if others:
        with trial(model) as (tokens, _):
            trunk(model)(input_ids=tokens[:1], use_cache=False)
    for hook in hooks:
        hook.remove()
    return sorted(unfit)


def _layers_of_one_memory(model: PreTrainedModel) -> set[str]:
    """Linear layers whose weights are those of another too (Zamba): merged, each would have the adapters of all."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    uses = Counter(layer.weight.data_ptr() for layer in layers.values() if not layer.weight.is_meta)
    return {name for name, layer in layers.items() if uses[layer.weight.data_ptr()] > 1}


@contextmanager
def _tied_is_known() -> Iterator[None]:
    """Without peft's warnings that an adapter on tied weights cannot be merged: they are untied."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*tie_word_embeddings|.*no longer tied after merging")
        yield


def untie_adapted_matrices(model: Any) -> None:
    """Give the output matrix memory of its own where an adapter is on one of two tied matrices.

    In training each of them has an adapter or none; merged into one memory, both would have both.
    """
    base = plain(model)
    source, target = base.get_input_embeddings(), base.get_output_embeddings()
    if target is None or (source, target) == (_frozen(source), _frozen(target)):
        return
    holder, shared = _frozen(target), _frozen(source).weight
    if holder.weight.data_ptr() == shared.data_ptr():
        holder.weight = torch.nn.Parameter(shared.detach().clone(), requires_grad=False)
        if World.from_environment().is_main:
            tell("an adapter on tied embeddings: the output matrix and the input embeddings are saved separately")


def _frozen(module: Any) -> Any:
    """The module that an adapter, or a copy that learns, was put on."""
    for name in ("base_layer", "original_module"):
        if hasattr(module, name):
            return _frozen(getattr(module, name))
    return module


def share_frozen_weights(model: Any, base: Any) -> None:
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


def merged_copy(model: Any) -> PreTrainedModel:
    """The model without peft: a copy with the adapter merged in, or the model itself."""
    return _merge(copy.deepcopy(model)) if hasattr(model, "merge_and_unload") else model


def merge_adapter(model: Any, name: str) -> PreTrainedModel:
    """The base with the adapter merged into its own memory, all of which may learn; `name` is the adapter's folder.

    Raises ConfigError for an adapter that cannot be merged, or changes the model when it is.
    """
    before = outputs(model)
    with refusing(name, "adapter"):
        alone = _merge(model)
    if not same(before, outputs(alone), alone):
        raise ConfigError(
            "the adapter merged into its base is another model", name, "merge it with the tool that made it"
        )
    alone.requires_grad_(True)
    alone.name_or_path = alone.config._name_or_path = name  # what an adapter on this model has for its base
    return alone


def _merge(model: Any) -> Any:
    with _tied_is_known():
        alone = model.merge_and_unload()
    matrices = [alone.get_input_embeddings(), alone.get_output_embeddings()]
    if None not in matrices:
        places = {matrix.weight.data_ptr() for matrix in matrices}
        for config in (alone.config, alone.config.get_text_config()):
            config.tie_word_embeddings = len(places) == 1
        alone.all_tied_weights_keys = alone.get_expanded_tied_weights_keys(all_submodels=True)
    return alone


def save_adapter(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The adapter alone, with config and tokenizer; the weights it belongs to stay where they are."""
    for settings in model.peft_config.values():
        base = Path(settings.base_model_name_or_path)
        settings.base_model_name_or_path = str(base.resolve() if base.exists() else base)
    model.save_pretrained(folder, save_embedding_layers=False)  # a pad token that was added has nothing to be saved
    plain(model).config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def adapter_base(folder: Path) -> str:
    """Folder or hub id of the model that an adapter was trained on. Raises ConfigError when it does not say."""
    base, seen = str(read_adapter_settings(folder).get("base_model_name_or_path") or ""), {folder.resolve()}
    if not base:
        raise ConfigError(
            "the adapter does not say which model it adapts",
            where=str(folder / ADAPTER),
            fix="set base_model_name_or_path",
        )
    place = Path(base)
    while is_adapter(place):
        if place.resolve() in seen:
            raise ConfigError(
                "the adapter's base is, in the end, the adapter itself",
                where=str(folder / ADAPTER),
                fix="set base_model_name_or_path to the model that it adapts",
            )
        seen.add(place.resolve())
        place = Path(str(read_adapter_settings(place).get("base_model_name_or_path")))
    return base


def read_adapter_settings(folder: Path) -> dict[str, Any]:
    """The adapter's own settings. Raises ConfigError when they cannot be read."""
    try:
        settings = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"the adapter's settings cannot be read: {error}",
            where=str(folder / ADAPTER),
            fix="copy the adapter's folder again",
        ) from error
    if not isinstance(settings, dict):
        raise ConfigError(
            "this is not the settings of an adapter", where=str(folder / ADAPTER), fix="copy the adapter's folder again"
        )
    return settings


def is_language_adapter(folder: Path) -> bool:
    """Whether the adapter was trained on a model that has the head of a language model."""
    return read_adapter_settings(folder).get("task_type") == "CAUSAL_LM"


def adapter_shapes(folder: Path) -> dict[str, list[int]]:
    """Shape of each weight that the adapter's file holds, by the name that the weight or its module has in the base."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        return {key.removeprefix(PREFIX): list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def attach_adapter(model: PreTrainedModel, folder: Path) -> Any:
    """The saved adapter on its base, frozen; what keel knows of the whole model lies in the adapter's own config.

    Raises ConfigError naming weights that are missing in its file, or that do not fit the base.
    """
    if not (folder / WEIGHTS).is_file():
        raise ConfigError(f"the adapter has no {WEIGHTS}", str(folder), "save it as safetensors")
    shapes, kind = adapter_shapes(folder), read_adapter_settings(folder).get("peft_type")
    if (folder / "config.json").is_file():
        model.config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        grow_embeddings(model, model.config.get_text_config().vocab_size)
    _grow_to(model, shapes)
    with warnings.catch_warnings(), _tied_is_known():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # they are named below
        adapted = _peft().PeftModel.from_pretrained(model, folder).eval()
    if not hasattr(adapted.base_model, "merge_and_unload"):
        raise ConfigError(f"an adapter of type {kind} changes no weights", str(folder), "use LoRA")
    read = _peft().get_peft_model_state_dict(adapted, save_embedding_layers=False)
    expected = {key.removeprefix(PREFIX) for key in read}
    refuse_missing(expected - shapes.keys(), shapes.keys() - expected, str(folder))
    untie_adapted_matrices(adapted)
    return adapted


def _grow_to(model: Any, shapes: Mapping[str, Sequence[int]]) -> None:
    """Let the base have as many tokens as the adapter's file holds embeddings of, where it holds all of them."""
    names = {id(module): name for name, module in model.named_modules()}
    matrices = [part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
    keys = [[f"{names[id(part)]}{layer}.weight" for layer in ("", ".base_layer")] for part in matrices]
    rows = [next((shapes[key][0] for key in pair if key in shapes), 0) for pair in keys]
    if len(set(rows)) == 1:
        grow_embeddings(model, rows[0])


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ConfigError("lora needs the package peft", fix="pip install peft") from None
    return peft


def _bare(name: str) -> str:
    """A weight's name without what peft puts in between."""
    return name.replace(".base_layer.", ".")
