"""Check model folders before a library reads them, and turn errors of the libraries into ConfigErrors."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from keel.errors import ConfigError

transformers_logging.set_verbosity_error()  # keel.models.weights checks the load reports of transformers instead
transformers_logging.disable_progress_bar()

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
ADAPTER = "adapter_config.json"
ID_KEYS = ("eos_token_id", "bos_token_id", "pad_token_id")
INDEX = "model.safetensors.index.json"


def read_part(auto_class: Any, name: str, what: str, **options: Any) -> Any:
    """Call `auto_class.from_pretrained` for a folder or a hub id. Raises ConfigError.

    Args:
        what: name of the object in errors, such as "tokenizer".
    """
    folder = Path(name)
    refuse_other_files(folder)
    if folder.exists() and not ((folder / "config.json").is_file() or is_adapter(folder)):
        inner = next((part for part in ("policy", "model") if (folder / part / "config.json").is_file()), None)
        fix = f"name its {inner}: {folder / inner}" if inner else "name the folder of a transformers model"
        raise ConfigError("this folder has no config.json", where=name, fix=fix)
    if not folder.exists() and _looks_like_path(name):
        raise ConfigError(
            "no such model folder", where=name, fix="correct the path, or name a hub id such as ORGANISATION/NAME"
        )
    refuse_pickles(folder)
    refuse_unfit_ids(folder)
    with load_errors_converted(name, what):
        if auto_class in (AutoConfig, AutoTokenizer):
            return auto_class.from_pretrained(name, trust_remote_code=False, **options)
        return auto_class.from_pretrained(name, use_safetensors=True, trust_remote_code=False, **options)


def is_adapter(folder: Path) -> bool:
    """Return whether this is the folder of an adapter rather than of a full model."""
    return (folder / ADAPTER).is_file()


@contextmanager
def load_errors_converted(name: str, what: str) -> Iterator[None]:
    """Turn the errors of transformers, peft and safetensors about a model into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except SafetensorError as error:
        raise ConfigError(
            f"cannot load the {what}: its weights are damaged ({error})", name, "copy or download the folder again"
        ) from error
    except StrictDataclassError as error:  # not a subclass of ValueError
        file, reason = Path(name) / "config.json", " ".join(str(error).split())[:300]
        where = str(file) if file.is_file() else name
        raise ConfigError(f"cannot load the {what}: {reason}", where, "correct this setting") from error
    except LookupError as error:
        raise ConfigError(f"cannot load the {what}: {error} is missing or unknown", where=name) from error
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
        if "padding_idx" in str(error).lower():
            fix = "set it to a token of the vocabulary, or to null"
            raise ConfigError("pad_token_id in config.json is beyond the embeddings", where=name, fix=fix) from error
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"the {what} comes with Python code, which keel does not run",
                where=name,
                fix="use an architecture that transformers knows",
            ) from error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # torch's messages have a heading that ends with a colon, and the reason in the next line.
        reason = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]) or type(error).__name__
        raise ConfigError(f"cannot load the {what}: {reason}", where=name) from error


def refuse_pickles(folder: Path) -> None:
    """Raise ConfigError for a folder whose weights are pickled: loading a pickle can run any code."""
    if any(folder.glob("*.safetensors")) or is_adapter(folder):
        pickled = []
    else:
        pickled = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLED)
    if pickled:
        raise ConfigError(
            f"{pickled[0]} is a pickle, which can run code when it is loaded",
            where=str(folder),
            fix="convert it where you trust it: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)",
        )


def refuse_other_files(folder: Path) -> None:
    """Raise ConfigError for a pipe or device in place of a file, and for a weight index that names other folders."""
    for path in folder.glob("*"):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ConfigError("this is not a regular file", where=str(path), fix="replace it by the file itself")
    index = folder / INDEX
    if not index.is_file():
        return
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            "cannot read the index of the weights", where=str(index), fix="copy or download the folder again"
        ) from error
    for name in sorted(map(str, names)):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ConfigError(
                f"the index names {name!r}, which is not a safetensors file of this folder",
                where=str(index),
                fix="copy or download the folder again",
            )
        if not (folder / name).is_file():
            what = f"the index names {name}, which is missing"
            raise ConfigError(what, str(index), "copy or download the folder again")


def refuse_quantization(config: Any, name: str) -> None:
    """Raise ConfigError for a model whose saved weights are quantized."""
    settings = getattr(config, "quantization_config", None)
    if settings:
        method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
        raise ConfigError(
            f"the weights in these files are quantized ({method})",
            where=name,
            fix="name the model with the original weights; to quantize it for training, set lora and quantization",
        )


def refuse_unfit_ids(folder: Path) -> None:
    """Raise ConfigError for ids of special tokens in config.json and generation_config.json that are not token ids.

    transformers does not check these values, and it ignores a generation config that it cannot read.
    """
    config = read_settings(folder / "config.json")
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    sizes = [part["vocab_size"] for part in parts if type(part.get("vocab_size")) is int]
    vocabulary = max(sizes, default=None)
    for file, settings in (
        *((folder / "config.json", part) for part in parts),
        (folder / "generation_config.json", read_settings(folder / "generation_config.json")),
    ):
        for key in ID_KEYS:
            # Only end tokens must be in the vocabulary: text without padding needs no pad token, and a tokenizer may
            # have one that the model cannot read.
            token_ids(settings.get(key), key, str(file), vocabulary if key == "eos_token_id" else None)


def read_settings(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, empty if there is no file. Raises ConfigError."""
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"this is not JSON: {error}", str(path), "copy or download the folder again") from error
    if not isinstance(settings, dict):
        raise ConfigError("this is not a JSON object", str(path), "copy or download the folder again")
    return settings


def token_ids(value: Any, key: str, where: str, vocabulary: int | None = None) -> list[int]:
    """Return the token ids in a setting: none, one, or a list. In some files, -1 means none.

    Raises ConfigError for any other value, and if all ids are beyond the vocabulary.
    """
    ids = [] if value is None else value if isinstance(value, list | tuple) else [value]
    for number in ids:
        if type(number) is not int or number < -1:
            raise ConfigError(
                f"{key} is {json.dumps(value, default=str)}, which is not a token id",
                where=where,
                fix=f"write the number of a token, a list of numbers, or null for {key}",
            )
    if ids and vocabulary is not None and min(ids) >= vocabulary:
        fix = f"set {key} to a token of the vocabulary, or to null"
        raise ConfigError(f"{key} is {min(ids)}, beyond the {vocabulary} tokens of the vocabulary", where, fix)
    return list(ids)


def _looks_like_path(name: str) -> bool:
    """Return whether a name is a path rather than a hub id, which is `name` or `owner/name`.

    `owner/name` is a path if a folder of the name `owner` exists.
    """
    is_here = "/" in name and Path(name).parent.is_dir()
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/") or is_here
