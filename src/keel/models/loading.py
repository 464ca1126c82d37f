"""Load models and tokenizers from a folder or the hub, and save them to plain folders."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from keel.data.chats import turn_end_id
from keel.errors import ConfigError
from keel.models.adapters import (
    Lora,
    adapter_base,
    adapter_shapes,
    attach_adapter,
    copy_base,
    is_language_adapter,
    merge_adapter,
    merged_copy,
    require_targets,
    save_adapter,
    with_lora,
)
from keel.models.bfloat16 import prepare_bfloat16
from keel.models.heads import compute_dtype, new_value_head, trunk, unwrap_model
from keel.models.model_files import is_adapter, load_errors_converted, read_part, refuse_quantization, token_ids
from keel.models.packed import pack_if_possible
from keel.models.pad_token import read_every_token, set_pad_id
from keel.models.quantized import import_bitsandbytes, quantization_name
from keel.models.sameness import probe_logprobs, probe_tokens, require_same
from keel.models.shallow import is_shallow, model_config, shallow_model
from keel.models.trunk_classifier import SequenceClassifier
from keel.models.vocabulary import FIX, num_embeddings
from keel.models.weights import (
    LANGUAGE_HEADS,
    format_names,
    refuse_missing,
    refuse_other_shapes,
    report_unread_weights,
    require_numbers,
    unread_weights,
)
from keel.terminal import print_line
from keel.world import is_main_process

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HEAD = "score.weight"


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model. A tokenizer without a pad token gets its end token as pad. Raises ConfigError."""
    folder = Path(name)
    if is_adapter(folder) and not (folder / "tokenizer_config.json").is_file():
        return load_tokenizer(adapter_base(folder))
    tokenizer = read_part(AutoTokenizer, name, "tokenizer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        what = "the tokenizer has neither a pad nor an end token"
        raise ConfigError(what, where=name, fix="set its pad_token and save it")
    return tokenizer


def load_causal_lm(name: str, dtype: str = "float32", lora: Lora | None = None, quantization: str | None = None) -> Any:
    """Load a causal language model in evaluation mode, so that dropout is off.

    For an adapter's folder, this is its base with the adapter merged, and all weights are trainable.

    Args:
        lora: adds a new adapter.
        quantization: quantizes the base of the new adapter: "nf4" or "int8".

    Raises ConfigError if the model cannot be loaded, or if weights are missing, of another shape, NaN or infinite.
    """
    if quantization:
        import_bitsandbytes()  # a missing package is reported before a large model is read
    if is_adapter(Path(name)) and not is_shallow(name):
        base = load_causal_lm(adapter_base(Path(name)), dtype)
        with load_errors_converted(name, "adapter"):
            adapted = attach_adapter(base, Path(name))
        require_numbers(adapted, name)
        model = merge_adapter(adapted, name)
    else:
        model, report = _read(AutoModelForCausalLM, name, "causal language model", dtype)
        unread = unread_weights(report, name)
        refuse_missing(report["missing_keys"], unread, name)
        report_unread_weights(unread, name)
        _prepare(model)
    if lora:
        require_targets(model, lora)
        model = with_lora(model, lora, "CAUSAL_LM", quantization)
    return model


def load_classifier(name: str, dtype: str = "float32", seed: int = 0, to_train: bool = False) -> Any:
    """Load a sequence classifier with one label.

    This is a reward model, an adapter of a reward model, or a language model with a new head.

    Args:
        seed: seed of the random weights below a new head, such as an encoder's pooler.
        to_train: add a new head to a language model, and merge an adapter. The head starts at zero, so that the first
            values and scores are zero and not noise. Without `to_train` the head must have been trained.

    Raises ConfigError if weights are missing, of another shape, NaN or infinite.
    """
    loaded = _classifier(name, dtype, seed, merge=to_train)
    claims_head = any(
        "SequenceClassification" in each for each in unwrap_model(loaded.model).config.architectures or []
    )
    if loaded.new and (claims_head or not to_train):
        unread = f", and has {format_names(loaded.unread)}, which was not read" if loaded.unread else ""
        raise ConfigError(
            f"this model has no trained head: its file lacks {format_names(loaded.new)}{unread}",
            where=name,
            fix="name a sequence classifier with one label, or train this model with `keel reward`",
        )
    report_unread_weights(loaded.unread, name)
    model: Any = unwrap_model(loaded.model)
    model.keel_new = loaded.new  # with an adapter, these weights are trained in full
    return loaded.model


@dataclass(frozen=True)
class _Classifier:
    """A classifier, the names of its weights that are in no file, and those in the files that were not read."""

    model: Any
    new: list[str]
    unread: list[str]


def _classifier(name: str, dtype: str, seed: int, merge: bool) -> _Classifier:
    """Load any model as a classifier, with an adapter on its base or merged into it."""
    folder = Path(name)
    if not is_adapter(folder) or is_shallow(name):
        return _plain_classifier(name, dtype, seed)
    unread = unread_weights({"unexpected_keys": []}, name)
    if is_language_adapter(folder):
        model = load_causal_lm(name, dtype)
        head = new_value_head(model)
        return _Classifier(
            _prepare(as_classifier(model, head, model.config.get_text_config().pad_token_id)), [HEAD], unread
        )
    base = _classifier(adapter_base(folder), dtype, seed, merge=True)
    with load_errors_converted(name, "adapter"):
        model = attach_adapter(base.model, folder)
    require_numbers(model, name)
    new = [key for key in base.new if key not in adapter_shapes(folder)]
    return _Classifier(merge_adapter(model, name) if merge else model, new, [*base.unread, *unread])


def _plain_classifier(name: str, dtype: str, seed: int) -> _Classifier:
    """Load a model without an adapter as a classifier.

    A new head is zero. New weights below it, such as an encoder's pooler, are random.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, report = _read(SequenceClassifier, name, "model", dtype, num_labels=1)
    prefix, unread = f"{model.base_model_prefix}.", unread_weights(report, name)
    below = {key for key in report["missing_keys"] if key.startswith(prefix) and "pooler" not in key}
    embedding = next(key for key, module in model.named_modules() if module is model.get_input_embeddings())
    refuse_missing(below - {f"{embedding}.weight"}, unread, name)
    if below:  # the file may have a tied embedding only under the name of the language model's head
        trunk(model).load_state_dict(trunk(load_causal_lm(name, dtype)).state_dict())
    new = sorted(report["missing_keys"] - below)
    for key, module in model.named_modules():  # the head is new; other layers with one output are part of the trunk
        if isinstance(module, nn.Linear) and module.out_features == 1 and f"{key}.weight" in new:
            nn.init.zeros_(module.weight)
    return _Classifier(_prepare(model), new, [key for key in unread if not key.startswith(LANGUAGE_HEADS)])


def _read(auto_class: Any, name: str, what: str, dtype: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Load a model and its load report. Raises ConfigError for weights of another shape, NaN or infinite weights."""
    refuse_quantization(model_config(name, auto_class), name)
    if dtype == "bfloat16":
        prepare_bfloat16()
    if is_shallow(name):
        empty: dict[str, Any] = dict.fromkeys(("missing_keys", "unexpected_keys", "mismatched_keys"), frozenset())
        return shallow_model(auto_class, name, DTYPES[dtype]), empty
    model, report = read_part(
        auto_class,
        name,
        what,
        dtype=DTYPES[dtype],
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refuse_other_shapes reports them with their names
        **options,
    )
    refuse_other_shapes(report, name)
    require_numbers(model, name)
    return model, report


def _prepare(model: Any) -> Any:
    """Set evaluation mode, let the pad token learn where it is text, and choose how the model reads rows."""
    read_every_token(model)
    if hasattr(model.eval(), "score") or model.get_output_embeddings() is not None:
        pack_if_possible(model)
    return model


def end_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop: Iterable[str] = (), where: str = "rollout.stop"
) -> list[int]:
    """Return every id that ends a response, in ascending order.

    These are the end tokens of the generation config, or else of the tokenizer, and the stop texts of one token.

    Args:
        where: the setting of the stop texts, for errors.

    Raises ConfigError if all are beyond the embeddings.
    """
    stops = [stop_token_id(tokenizer, text) for text in stop]
    ids = {*configured_ends(model.generation_config, tokenizer), *(token for token in stops if token is not None)}
    ends = sorted(token for token in ids if token >= 0)  # some configs have -1 for none
    if ends and ends[0] >= num_embeddings(model):
        raise ConfigError(f"end token {ends[0]} is beyond the {num_embeddings(model)} embeddings", where=where, fix=FIX)
    return ends


def configured_ends(generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the end tokens of a generation config, or else of the tokenizer."""
    ends = generation.eos_token_id if generation else None
    ends = tokenizer.eos_token_id if ends is None else ends
    return token_ids(ends, "eos_token_id", tokenizer.name_or_path)


def stop_at_turns(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add the token that ends a turn in the chat template to the end tokens of the model."""
    ends, turn_end = end_token_ids(model, tokenizer), turn_end_id(tokenizer)
    if turn_end is not None and turn_end not in ends and model.generation_config:
        model.generation_config.eos_token_id = sorted({*ends, turn_end})


def stop_token_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """Return the single token for a text, as it is encoded or as it is in the vocabulary; None if there is none.

    Tokenizers that add a leading space encode "." as two tokens, although "." is in the vocabulary.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return ids[0]
    return tokenizer.get_vocab().get(text)


def stop_texts(tokenizer: PreTrainedTokenizerBase, stop: Iterable[str], where: str = "rollout.stop") -> list[str]:
    """Return the stop texts of several tokens.

    Raises ConfigError, naming the setting `where`, for a text that this tokenizer cannot encode.
    """
    texts = [text for text in stop if stop_token_id(tokenizer, text) is None]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if not ids or tokenizer.unk_token_id in ids:
            raise ConfigError(f"this model cannot write the stop text {text!r}", where=where, fix="leave it out")
    return texts


def save_model(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save safetensors, tokenizer and generation config to a plain transformers folder, with any adapter merged."""
    merged_copy(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_policy(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a trained policy. A LoRA adapter is merged, and also saved separately in the folder `adapter`.

    Raises CheckpointError if the log-probs of the saved model differ from those of the model.
    """
    save_model(model, tokenizer, folder)
    places = [folder]
    if hasattr(model, "peft_config"):
        save_adapter(model, tokenizer, folder / "adapter")
        report_merge(model)
        places.append(folder / "adapter")
    tokens = probe_tokens(model)
    trained = probe_logprobs(model, tokens)
    for place in places:
        saved = load_causal_lm(str(place), dtype_name(model)).to(unwrap_model(model).device)
        require_same(trained, probe_logprobs(saved, tokens), model, place)


def report_merge(model: Any) -> None:
    """Report the number format in which an adapter on a quantized base was merged."""
    if (quantization := quantization_name(model)) and is_main_process():
        print_line(f"the adapter is merged into the {quantization} base, dequantized to {dtype_name(model)}")


def dtype_name(model: Any) -> str:
    """Return the setting `dtype` with which a copy of the model is loaded; "float32" for any other type."""
    dtype = compute_dtype(model)
    return next((name for name, known in DTYPES.items() if known == dtype), "float32")


def as_classifier(model: Any, head: nn.Linear, pad_id: int | None) -> PreTrainedModel:
    """Return a classifier of the trunk of a language model with a value head. Critics are saved in this form."""
    source = merged_copy(model)
    config = copy.deepcopy(source.config)
    config.dtype = source.dtype  # saving a model sets it to a string, which some layers (Apertus) do not accept
    config.num_labels = 1
    classifier = SequenceClassifier.from_config(config)
    trunk(classifier).load_state_dict(trunk(source).state_dict())
    classifier.score.load_state_dict(head.state_dict())
    if pad_id is not None:  # transformers uses the pad token to find the last token of a text
        set_pad_id(classifier, pad_id)
    return classifier.eval()


def classifier_on_base(model: Any) -> Any:
    """Return a classifier with a head of zeros on the base of a language model with an adapter.

    The two share the memory of the base.
    """
    base: Any = copy_base(model)
    base.config.num_labels = 1
    with torch.device("meta"):
        classifier = SequenceClassifier.from_config(base.config, dtype=base.dtype)
    setattr(classifier, classifier.base_model_prefix, trunk(base))
    nn.init.zeros_(classifier.score.to_empty(device=base.device).weight)
    classifier.keel_reads_single_rows, classifier.keel_new = base.keel_reads_single_rows, [HEAD]
    return classifier.eval()
