"""Models and tokenizers from a folder or the hub, and back to a plain folder."""

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
    is_language_adapter,
    merge_adapter,
    merged_copy,
    require_targets,
    save_adapter,
    with_lora,
)
from keel.models.files import is_adapter, read_part, refusing, token_ids
from keel.models.heads import new_value_head, plain, trunk
from keel.models.packed import pack_if_possible
from keel.models.pad_token import read_every_token, set_pad_id
from keel.models.sameness import probe_logprobs, probe_tokens, require_same
from keel.models.shallow import is_shallow, shallow_model
from keel.models.trunk_classifier import SequenceClassifier
from keel.models.vocabulary import FIX, num_embeddings
from keel.models.weights import (
    LANGUAGE_HEADS,
    format_names,
    name_unread,
    refuse_missing,
    refuse_other_shapes,
    require_numbers,
    unread_weights,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HEAD = "score.weight"


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; one without a pad token gets its end token as pad. Raises ConfigError."""
    folder = Path(name)
    if is_adapter(folder) and not (folder / "tokenizer_config.json").is_file():
        return load_tokenizer(adapter_base(folder))
    tokenizer = read_part(AutoTokenizer, name, "tokenizer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ConfigError("tokenizer has neither pad nor end token", where=name, fix="set its pad_token and save it")
    return tokenizer


def load_causal_lm(name: str, dtype: str = "float32", lora: Lora | None = None) -> Any:
    """A causal language model in evaluation mode (so dropout is off), with a fresh adapter if asked for.

    Of an adapter's folder, its base with the adapter merged in, all of which may learn. Raises ConfigError when it
    cannot be loaded, or its weights are missing, of another shape, or not numbers.
    """
    if is_adapter(Path(name)) and not is_shallow(name):
        base = load_causal_lm(adapter_base(Path(name)), dtype)
        with refusing(name, "adapter"):
            adapted = attach_adapter(base, Path(name))
        require_numbers(adapted, name)
        model = merge_adapter(adapted, name)
    else:
        model, report = _read(AutoModelForCausalLM, name, "causal language model", dtype)
        unread = unread_weights(report, name)
        refuse_missing(report["missing_keys"], unread, name)
        name_unread(unread, name)
        _ready(model)
    if lora:
        require_targets(model, lora)
        model = with_lora(model, lora, "CAUSAL_LM")
    return model


def load_classifier(name: str, dtype: str = "float32", seed: int = 0, to_train: bool = False) -> Any:
    """A sequence classifier with one label: a reward model, an adapter of one, or a language model under a new head.

    Args:
        seed: of the random weights below a new head, such as an encoder's pooler.
        to_train: a language model gets a new head, which starts at zero so that its first values and scores are zero
            and not noise; an adapter is merged in. Else the head must have been trained.

    Raises ConfigError naming what is missing, of another shape, or not a number.
    """
    loaded = _classifier(name, dtype, seed, merge=to_train)
    claims_head = any("SequenceClassification" in each for each in plain(loaded.model).config.architectures or [])
    if loaded.new and (claims_head or not to_train):
        held = f", and holds {format_names(loaded.unread)}, which was not read" if loaded.unread else ""
        raise ConfigError(
            f"this model has no trained head: its file lacks {format_names(loaded.new)}{held}",
            where=name,
            fix="give a sequence classifier with one label, or make one of it with `keel reward`",
        )
    name_unread(loaded.unread, name)
    model: Any = plain(loaded.model)
    model.keel_new = loaded.new  # an adapter learns these in full
    return loaded.model


@dataclass(frozen=True)
class _Classifier:
    """A classifier, the weights that no file holds, and those of the files that were not read."""

    model: Any
    new: list[str]
    unread: list[str]


def _classifier(name: str, dtype: str, seed: int, merge: bool) -> _Classifier:
    """Any model as a classifier; an adapter is on its base, or merged into it."""
    folder = Path(name)
    if not is_adapter(folder) or is_shallow(name):
        return _plain_classifier(name, dtype, seed)
    unread = unread_weights({"unexpected_keys": []}, name)
    if is_language_adapter(folder):
        model = load_causal_lm(name, dtype)
        head = new_value_head(model)
        return _Classifier(
            _ready(as_classifier(model, head, model.config.get_text_config().pad_token_id)), [HEAD], unread
        )
    base = _classifier(adapter_base(folder), dtype, seed, merge=True)
    with refusing(name, "adapter"):
        model = attach_adapter(base.model, folder)
    require_numbers(model, name)
    new = [key for key in base.new if key not in adapter_shapes(folder)]
    return _Classifier(merge_adapter(model, name) if merge else model, new, [*base.unread, *unread])


def _plain_classifier(name: str, dtype: str, seed: int) -> _Classifier:
    """A new head is zero; what is new below it, such as an encoder's pooler, is random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, report = _read(SequenceClassifier, name, "model", dtype, num_labels=1)
    prefix, unread = f"{model.base_model_prefix}.", unread_weights(report, name)
    below = {key for key in report["missing_keys"] if key.startswith(prefix) and "pooler" not in key}
    embedding = next(key for key, module in model.named_modules() if module is model.get_input_embeddings())
    refuse_missing(below - {f"{embedding}.weight"}, unread, name)
    if below:  # a tied embedding may be in the file under the language model's head only
        trunk(model).load_state_dict(trunk(load_causal_lm(name, dtype)).state_dict())
    new = sorted(report["missing_keys"] - below)
    for key, module in model.named_modules():  # some trunks have layers of one output too, which are no head
        if isinstance(module, nn.Linear) and module.out_features == 1 and f"{key}.weight" in new:
            nn.init.zeros_(module.weight)
    return _Classifier(_ready(model), new, [key for key in unread if not key.startswith(LANGUAGE_HEADS)])


def _read(auto_class: Any, name: str, what: str, dtype: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model and the report of its loading. Raises ConfigError for weights of another shape, or not numbers."""
    if is_shallow(name):
        nothing: dict[str, Any] = dict.fromkeys(("missing_keys", "unexpected_keys", "mismatched_keys"), frozenset())
        return shallow_model(auto_class, name, DTYPES[dtype]), nothing
    model, report = read_part(
        auto_class,
        name,
        what,
        dtype=DTYPES[dtype],
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in the report, and refused by name
        **options,
    )
    refuse_other_shapes(report, name)
    require_numbers(model, name)
    return model, report


def _ready(model: Any) -> Any:
    """The model in evaluation mode, reading every token, without work on padding if it can."""
    read_every_token(model)
    if hasattr(model.eval(), "score") or model.get_output_embeddings() is not None:
        pack_if_possible(model)
    return model


def end_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop: Iterable[str] = (), where: str = "rollout.stop"
) -> list[int]:
    """Every id that ends a response: those of the generation config, else the tokenizer's, and the stop texts of one
    token.

    Raises ConfigError of the setting `where` for one that is beyond the embeddings.
    """
    stops = [stop_token_id(tokenizer, text) for text in stop]
    ids = {*configured_ends(model.generation_config, tokenizer), *(token for token in stops if token is not None)}
    found = sorted(token for token in ids if token >= 0)  # some configs write -1 for none
    if found and found[0] >= num_embeddings(model):
        raise ConfigError(
            f"end token {found[0]} is beyond the {num_embeddings(model)} embeddings", where=where, fix=FIX
        )
    return found


def configured_ends(generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end tokens of a generation config, else the tokenizer's."""
    ends = generation.eos_token_id if generation else None
    ends = tokenizer.eos_token_id if ends is None else ends
    return token_ids(ends, "eos_token_id", tokenizer.name_or_path)


def stop_at_turns(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add the token with which the chat template ends a turn to those that end the model's responses."""
    ends, turn_end = end_token_ids(model, tokenizer), turn_end_id(tokenizer)
    if turn_end is not None and turn_end not in ends and model.generation_config:
        model.generation_config.eos_token_id = sorted({*ends, turn_end})


def stop_token_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """The one token that is this text, as it is encoded or as the vocabulary spells it; None where it is several.

    Tokenizers that put a space before a text encode "." as two tokens, though "." is one.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return ids[0]
    return tokenizer.get_vocab().get(text)


def stop_texts(tokenizer: PreTrainedTokenizerBase, stop: Iterable[str], where: str = "rollout.stop") -> list[str]:
    """Those of the stop texts that are several tokens.

    Raises ConfigError of the setting `where` for one that this tokenizer cannot write.
    """
    texts = [text for text in stop if stop_token_id(tokenizer, text) is None]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if not ids or tokenizer.unk_token_id in ids:
            raise ConfigError(f"this model cannot write the stop text {text!r}", where=where, fix="leave it out")
    return texts


def save_model(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A plain transformers folder: safetensors, tokenizer, generation config. An adapter is merged into the weights."""
    plain = merged_copy(model)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_policy(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """As `save_model`, for a result: a LoRA adapter is merged in, and is in the folder `adapter` by itself too.

    Raises CheckpointError if what was saved does not give the log-probs that the model gives.
    """
    save_model(model, tokenizer, folder)
    places = [folder]
    if hasattr(model, "peft_config"):
        save_adapter(model, tokenizer, folder / "adapter")
        places.append(folder / "adapter")
    tokens = probe_tokens(model)
    trained = probe_logprobs(model, tokens)
    for place in places:
        saved = load_causal_lm(str(place), dtype_name(model)).to(plain(model).device)
        require_same(trained, probe_logprobs(saved, tokens), model, place)


def dtype_name(model: Any) -> str:
    """Name of the type that a copy of the model is loaded in; the widest for one that no setting names."""
    dtype = plain(model).get_input_embeddings().weight.dtype
    return next((name for name, known in DTYPES.items() if known == dtype), "float32")


def as_classifier(model: Any, head: nn.Linear, pad_id: int | None) -> PreTrainedModel:
    """The trunk of a language model under a value head, in the form in which critics are saved."""
    own = merged_copy(model)
    config = copy.deepcopy(own.config)
    config.dtype = own.dtype  # saving a model leaves a name there, which some layers (Apertus) do not take
    config.num_labels = 1
    classifier = SequenceClassifier.from_config(config)
    trunk(classifier).load_state_dict(trunk(own).state_dict())
    classifier.score.load_state_dict(head.state_dict())
    if pad_id is not None:  # that of the tokenizer: transformers finds the last token of a text by it
        set_pad_id(classifier, pad_id)
    return classifier.eval()
