"""Models and tokenizers from a folder or the hub, and back to a plain folder."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from keel.data.chats import turn_end_id
from keel.errors import ConfigError
from keel.models.adapters import Lora, base_of, is_adapter, merged, put_on, with_lora
from keel.models.packed import pack_if_possible

transformers_logging.set_verbosity_error()  # its load reports list new heads, which are what we ask for
transformers_logging.disable_progress_bar()

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; one without a pad token gets its end token as pad. Raises ConfigError."""
    folder = Path(name)
    if is_adapter(folder) and not (folder / "tokenizer_config.json").is_file():
        name = base_of(folder)
    tokenizer = _load(AutoTokenizer, name, "tokenizer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ConfigError("tokenizer has neither pad nor end token", where=name, fix="set its pad_token and save it")
    return tokenizer


def load_causal_lm(name: str, dtype: str = "float32", lora: Lora | None = None) -> Any:
    """A causal language model in evaluation mode (so dropout is off), with a fresh adapter if asked for.

    Of an adapter's folder, its base with the adapter merged in.
    """
    if is_adapter(Path(name)):
        base = load_causal_lm(base_of(Path(name)), dtype)
        with refusing(name, "adapter"):
            model = put_on(base, Path(name)).merge_and_unload()
        return with_lora(model, lora, "CAUSAL_LM") if lora else model
    model, report = _load(
        AutoModelForCausalLM, name, "causal language model", dtype=DTYPES[dtype], output_loading_info=True
    )
    if report["missing_keys"]:
        raise ConfigError(f"weights are missing, such as {sorted(report['missing_keys'])[0]}", where=name)
    read_every_token(model)
    pack_if_possible(model.eval())
    return with_lora(model, lora, "CAUSAL_LM") if lora else model


def load_classifier(name: str, dtype: str = "float32", seed: int = 0) -> Any:
    """A sequence classifier with one label: a reward model, an adapter of one, or a language model under a new head.

    The new head starts at zero, so that its first values and scores are zero and not noise.
    """
    if is_adapter(Path(name)):
        base = load_classifier(base_of(Path(name)), dtype, seed)
        with refusing(name, "adapter"):
            return put_on(base, Path(name))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, report = _load(
            AutoModelForSequenceClassification,
            name,
            "model",
            dtype=DTYPES[dtype],
            num_labels=1,
            output_loading_info=True,
        )
    prefix = f"{model.base_model_prefix}."
    new_head = [key for key in report["missing_keys"] if not key.startswith(prefix)]
    lost = [key for key in report["missing_keys"] if key.startswith(prefix) and "pooler" not in key]
    if lost:  # a tied embedding may lie in the file under the language model's head only
        model.base_model.load_state_dict(load_causal_lm(name, dtype).base_model.state_dict())
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features == 1 and new_head:
            nn.init.zeros_(module.weight)
    read_every_token(model)
    if hasattr(model.eval(), "score"):
        pack_if_possible(model)
    return model


def read_every_token(model: Any) -> None:
    """Let the embedding of the pad token learn where it is text: torch gives a row of `padding_idx` no gradient.

    Tokens under the mask need no such rule: nothing that is counted depends on them.
    """
    model.get_input_embeddings().padding_idx = None


def end_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop: Iterable[str] = (), where: str = "rollout.stop"
) -> list[int]:
    """Every id that ends a response: those of the generation config, else the tokenizer's, and the stop tokens.

    Raises ConfigError of the setting `where` for a stop text that is no token.
    """
    configured = model.generation_config.eos_token_id if model.generation_config else None
    if configured is None:
        configured = tokenizer.eos_token_id
    ends = [] if configured is None else [configured] if isinstance(configured, int) else list(configured)
    return sorted({*ends, *(stop_token_id(tokenizer, text, where) for text in stop)})


def stop_at_turns(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add the token with which the chat template ends a turn to those that end the model's responses."""
    ends, turn_end = end_token_ids(model, tokenizer), turn_end_id(tokenizer)
    if turn_end is not None and turn_end not in ends and model.generation_config:
        model.generation_config.eos_token_id = sorted({*ends, turn_end})


def stop_token_id(tokenizer: PreTrainedTokenizerBase, text: str, where: str) -> int:
    """The one token that is this text, as it is encoded or as the vocabulary spells it.

    Tokenizers that put a space before a text encode "." as two tokens, though "." is one. Raises ConfigError.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return ids[0]
    spelled = tokenizer.get_vocab().get(text)
    if spelled is None:
        what = f"{len(ids)} tokens" if len(ids) > 1 else "no token of this model"
        raise ConfigError(f"stop {text!r} is {what}", where=where, fix="give single tokens")
    return spelled


def save_model(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A plain transformers folder: safetensors, tokenizer, generation config. An adapter is merged into the weights."""
    plain = merged(model)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def as_classifier(model: Any, head: nn.Linear, pad_id: int) -> PreTrainedModel:
    """The trunk of a language model under a value head, in the form in which critics are saved."""
    own = merged(model)
    config = copy.deepcopy(own.config)
    config.num_labels = 1
    config.pad_token_id = pad_id  # that of the tokenizer: transformers finds the last token of a text by it
    classifier = AutoModelForSequenceClassification.from_config(config)
    classifier.base_model.load_state_dict(own.base_model.state_dict())
    classifier.score.load_state_dict(head.state_dict())
    return classifier.eval()


def _load(auto_class: Any, name: str, what: str, **options: Any) -> Any:
    folder = Path(name)
    if folder.exists() and not ((folder / "config.json").is_file() or is_adapter(folder)):
        inner = next((part for part in ("policy", "model") if (folder / part / "config.json").is_file()), None)
        fix = f"name its {inner}: {folder / inner}" if inner else "give a transformers model folder"
        raise ConfigError("this folder holds no config.json", where=name, fix=fix)
    if not folder.exists() and _looks_like_path(name):
        raise ConfigError("no such model folder", where=name)
    refuse_pickles(folder)
    with refusing(name, what):
        if auto_class is AutoTokenizer:
            return auto_class.from_pretrained(name, trust_remote_code=False)
        return auto_class.from_pretrained(name, use_safetensors=True, trust_remote_code=False, **options)


@contextmanager
def refusing(name: str, what: str) -> Iterator[None]:
    """Turn what transformers, peft and safetensors say of a folder that they cannot use into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"the {what} is Python code of its own, which keel does not run",
                where=name,
                fix="use an architecture that transformers knows",
            ) from error
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"cannot load the {what}: {reason}", where=name) from error


def refuse_pickles(folder: Path) -> None:
    """Raise ConfigError for a folder whose weights are pickled: to read them may run any code."""
    if any(folder.glob("*.safetensors")) or is_adapter(folder):
        pickled = []
    else:
        pickled = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLED)
    if pickled:
        raise ConfigError(
            f"{pickled[0]} is a pickle, which can run code when it is read",
            where=str(folder),
            fix="convert it where you trust it: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)",
        )


def _looks_like_path(name: str) -> bool:
    """A hub id is `name` or `owner/name`; anything else can only be a path, as can what has a folder here for owner."""
    is_here = "/" in name and Path(name).parent.is_dir()
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/") or is_here
