"""Low-rank adapters (LoRA, Hu et al. 2021) through peft: few trainable weights on a frozen base, which models share."""

import copy
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from keel.errors import ConfigError
from keel.models.heads import trunk, unwrap_model
from keel.models.model_files import ADAPTER, is_adapter, load_errors_converted
from keel.models.pad_token import grow_embeddings
from keel.models.quantized import (
    KEY,
    QuantizedLinear,
    dequantize_model,
    quantize_model,
    shared_linear_layers,
)
from keel.models.sameness import outputs, outputs_agree
from keel.models.trial import trial
from keel.models.weights import refuse_missing
from keel.terminal import print_line
from keel.world import is_main_process

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Prefix of every weight's name in an adapter's file."""

STATE_SPACES = {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}
"""Families whose `out_proj` peft refuses to adapt."""


class Lora(Protocol):
    """Settings of an adapter."""

    @property
    def r(self) -> int: ...
    @property
    def alpha(self) -> int: ...
    @property
    def target_modules(self) -> list[str] | str: ...


def with_lora(model: PreTrainedModel, lora: Lora, task: str, quantization: str | None = None) -> Any:
    """Add a low-rank adapter to a model. Only the adapter learns, and a classifier's head and other new weights.

    Args:
        task: of peft, such as "CAUSAL_LM".
        quantization: quantizes the model first: "nf4" or "int8".

    Raises ConfigError for a model that cannot be adapted or quantized.
    """
    peft = _peft()
    targets = list(lora.target_modules) if not isinstance(lora.target_modules, str) else lora.target_modules
    new = {key.rpartition(".")[0] for key in getattr(model, "keel_new", [])}
    settings = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=targets,
        lora_dropout=0.0,
        task_type=task,
        # peft trains `score` and `classifier` without being asked.
        modules_to_save=sorted(new - {"score", "classifier"}) or None,
        exclude_modules=_unfit_layers(model) or None if targets == "all-linear" else None,
    )
    if quantization:
        quantize_model(model, quantization, new)
    try:
        with _peft_warnings_ignored():
            wrapped = peft.get_peft_model(model, settings).eval()
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split()), where="lora.target_modules") from error
    untie_adapted_matrices(wrapped)
    return wrapped


def require_targets(model: PreTrainedModel, lora: Lora) -> None:
    """Raise ConfigError for a name in `target_modules` without a layer, or whose layers share their weights.

    peft only refuses a list in which no name has a layer.
    """
    if isinstance(lora.target_modules, str):
        return
    names = [f".{name}" for name, _ in model.named_modules()]
    absent = [target for target in lora.target_modules if not any(name.endswith(f".{target}") for name in names)]
    if absent:
        linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        layers = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        what = f"the model has no layer {absent[0]!r}; its linear layers: {layers}"
        raise ConfigError(what, where="lora.target_modules", fix="correct the name, or leave it out")
    for name in sorted(shared_linear_layers(model)):
        if matching := [target for target in lora.target_modules if f".{name}".endswith(f".{target}")]:
            what = f"{matching[0]!r} names layers that share their weights, such as {name}"
            raise ConfigError(what, where="lora.target_modules", fix="leave it out, or set all-linear")


def _unfit_layers(model: PreTrainedModel) -> list[str]:
    """Return the linear layers that cannot have an adapter.

    These are layers that return something other than a tensor (Llama 4's router), layers of state-space models whose
    weights are used outside of their forward pass, which peft refuses, and layers that share their weights.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    refused = {"out_proj"} if model.config.model_type in STATE_SPACES else set()
    unfit = {name for name in layers if name.rpartition(".")[2] in refused} | shared_linear_layers(model)
    known = nn.Linear.forward, QuantizedLinear.forward
    others = {name: layer for name, layer in layers.items() if type(layer).forward not in known}

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


@contextmanager
def _peft_warnings_ignored() -> Iterator[None]:
    """Inside, peft does not warn that an adapter on tied weights cannot be merged, since keel unties them.

    Neither is its use of an old name in transformers reported, about which a user can do nothing.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*tie_word_embeddings|.*no longer tied after merging")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def untie_adapted_matrices(model: Any) -> None:
    """Copy the output matrix if it is tied to the input embeddings and one of the two has an adapter.

    In training, each has a separate adapter or none. Merged into shared memory, both would have both adapters.
    """
    base = unwrap_model(model)
    source, target = base.get_input_embeddings(), base.get_output_embeddings()
    if target is None or (source, target) == (_frozen(source), _frozen(target)):
        return
    holder, shared = _frozen(target), _frozen(source).weight
    if holder.weight.data_ptr() == shared.data_ptr():
        holder.weight = torch.nn.Parameter(shared.detach().clone(), requires_grad=False)
        if is_main_process():
            print_line(
                "the adapter is on tied embeddings: the output matrix and the input embeddings are saved separately"
            )


def _frozen(module: Any) -> Any:
    """Return the module inside peft's layers, to which an adapter or a trainable copy was added."""
    for name in ("base_layer", "original_module"):
        if hasattr(module, name):
            return _frozen(getattr(module, name))
    return module


def share_frozen_weights(model: Any, base: Any) -> None:
    """Let frozen trunk weights of `model` that equal those of `base` share their memory.

    The adapters of policy, critic and reward model then need one base in memory, and remain separate models.
    """
    frozen = {_bare(name): weight for name, weight in trunk(base).named_parameters() if not weight.requires_grad}
    for name, weight in trunk(model).named_parameters():
        twin = frozen.get(_bare(name))
        if twin is None or weight.requires_grad or (weight.shape, weight.dtype) != (twin.shape, twin.dtype):
            continue
        if torch.equal(weight, twin):
            weight.data = twin.data


def copy_base(model: Any) -> PreTrainedModel:
    """Return the model below an adapter as a separate model, whose frozen weights are in the same memory."""
    frozen = [weight for weight in model.parameters() if not weight.requires_grad]
    shared: dict[int, Any] = {id(weight): nn.Parameter(weight.data, requires_grad=False) for weight in frozen}
    shared |= {id(buffer): buffer for buffer in model.buffers()}
    base: PreTrainedModel = copy.deepcopy(model, shared).unload()
    return base


def merged_copy(model: Any) -> PreTrainedModel:
    """Return the model without peft: a copy with the adapter merged, or the model itself if it has no adapter.

    A quantized base is dequantized first.
    """
    return _merge(copy.deepcopy(model)) if hasattr(model, "merge_and_unload") else model


def merge_adapter(model: Any, name: str) -> PreTrainedModel:
    """Merge the adapter into the memory of its base, and return the base with all weights trainable.

    Args:
        name: the adapter's folder.

    Raises ConfigError if the adapter cannot be merged, or if merging changes the model's outputs.
    """
    expected = outputs(model)
    with load_errors_converted(name, "adapter"):
        merged = _merge(model)
    if not outputs_agree(expected, outputs(merged), merged):
        raise ConfigError(
            "merging the adapter changes the model's outputs", name, "merge it with the tool that made it"
        )
    merged.requires_grad_(True)
    merged.name_or_path = merged.config._name_or_path = name  # a new adapter on this model saves this as its base
    return merged


def _merge(model: Any) -> Any:
    dequantize_model(model)
    with _peft_warnings_ignored():
        merged = model.merge_and_unload()
    matrices = [merged.get_input_embeddings(), merged.get_output_embeddings()]
    if None not in matrices:
        # The config must match the memory, since transformers ties the two matrices on loading according to it.
        places = {matrix.weight.data_ptr() for matrix in matrices}
        for config in (merged.config, merged.config.get_text_config()):
            config.tie_word_embeddings = len(places) == 1
        merged.all_tied_weights_keys = merged.get_expanded_tied_weights_keys(all_submodels=True)
    return merged


def save_adapter(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the adapter without its base, with config and tokenizer."""
    for settings in model.peft_config.values():
        base = Path(settings.base_model_name_or_path)
        settings.base_model_name_or_path = str(base.resolve() if base.exists() else base)
    model.save_pretrained(folder, save_embedding_layers=False)  # an added pad token has nothing to save
    unwrap_model(model).config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def adapter_base(folder: Path) -> str:
    """Return the folder or hub id of the model that an adapter was trained on. Raises ConfigError if it has none."""
    base, seen = str(read_adapter_settings(folder).get("base_model_name_or_path") or ""), {folder.resolve()}
    if not base:
        raise ConfigError(
            "the adapter does not name the model that it adapts",
            where=str(folder / ADAPTER),
            fix="set base_model_name_or_path",
        )
    place = Path(base)
    while is_adapter(place):
        if place.resolve() in seen:
            raise ConfigError(
                "the adapter's base is the adapter itself, directly or through other adapters",
                where=str(folder / ADAPTER),
                fix="set base_model_name_or_path to the model that it adapts",
            )
        seen.add(place.resolve())
        place = Path(str(read_adapter_settings(place).get("base_model_name_or_path")))
    return base


def read_adapter_settings(folder: Path) -> dict[str, Any]:
    """Read the settings of an adapter. Raises ConfigError if they cannot be read."""
    try:
        settings = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"cannot read the adapter's settings: {error}",
            where=str(folder / ADAPTER),
            fix="copy the adapter's folder again",
        ) from error
    if not isinstance(settings, dict):
        raise ConfigError(
            "these are not the settings of an adapter",
            where=str(folder / ADAPTER),
            fix="copy the adapter's folder again",
        )
    return settings


def is_language_adapter(folder: Path) -> bool:
    """Return whether the adapter was trained on a model with the head of a language model."""
    return read_adapter_settings(folder).get("task_type") == "CAUSAL_LM"


def adapter_shapes(folder: Path) -> dict[str, list[int]]:
    """Return the shape of each weight in the adapter's file, by the name of the weight or its module in the base."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        return {key.removeprefix(PREFIX): list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def attach_adapter(model: PreTrainedModel, folder: Path) -> Any:
    """Put a saved adapter on its base, frozen. The config of the full model is the one in the adapter's folder.

    The base is quantized if it was quantized when the adapter was trained.

    Raises ConfigError for weights that are missing in its file, or that do not fit the base.
    """
    if not (folder / WEIGHTS).is_file():
        raise ConfigError(f"the adapter has no {WEIGHTS}", str(folder), "save the adapter as safetensors")
    shapes, kind = adapter_shapes(folder), read_adapter_settings(folder).get("peft_type")
    if (folder / "config.json").is_file():
        model.config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        grow_embeddings(model, model.config.get_text_config().vocab_size)
    _grow_to(model, shapes)
    if (quantization := getattr(model.config, KEY, None)) is not None:
        quantize_model(model, quantization, {key.rpartition(".")[0] for key in shapes})
    with warnings.catch_warnings(), _peft_warnings_ignored():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # refuse_missing names them below
        adapted = _peft().PeftModel.from_pretrained(model, folder).eval()
    if not hasattr(adapted.base_model, "merge_and_unload"):
        raise ConfigError(f"an adapter of type {kind} cannot be merged into weights", str(folder), "use LoRA")
    read = _peft().get_peft_model_state_dict(adapted, save_embedding_layers=False)
    expected = {key.removeprefix(PREFIX) for key in read}
    refuse_missing(expected - shapes.keys(), shapes.keys() - expected, str(folder))
    untie_adapted_matrices(adapted)
    return adapted


def _grow_to(model: Any, shapes: Mapping[str, Sequence[int]]) -> None:
    """Extend the base to as many tokens as the adapter's file has embeddings, if the file has all embeddings."""
    names = {id(module): name for name, module in model.named_modules()}
    matrices = [each for each in (model.get_input_embeddings(), model.get_output_embeddings()) if each is not None]
    keys = [[f"{names[id(each)]}{layer}.weight" for layer in ("", ".base_layer")] for each in matrices]
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
    """Return a weight's name without the level that peft inserts."""
    return name.replace(".base_layer.", ".")
