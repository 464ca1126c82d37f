"""F-19, F-20, F-25 to F-29: a model folder from anywhere is used as it is meant, or refused in one line; no code in it
ever runs."""

import json
import pickle  # noqa: TID251 - to write what must be refused
import resource
import shutil
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import keel
from keel.config import LoraSettings
from keel.data import chat_template as templates
from keel.data.chats import render_chat
from keel.errors import ConfigError, DataError, KeelError
from keel.models.adapters import save_adapter, with_lora
from keel.models.loading import load_causal_lm, load_classifier, load_tokenizer

from ..conftest import word_tokenizer
from ..runs import settings, share_of_w3


@pytest.fixture
def folder(tiny_policy: Path, tmp_path: Path) -> Path:
    """A model folder to be spoilt."""
    return Path(shutil.copytree(tiny_policy, tmp_path / "model"))


def load(folder: Path) -> None:
    load_tokenizer(str(folder))
    load_causal_lm(str(folder))


def spoil_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def without_weight(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop(name)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def index_outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    weights = dict.fromkeys(load_file(folder.parent / "outside.safetensors"), "../outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))


SPOILT: dict[str, Callable[[Path], Any]] = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "config is no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "config is a list": lambda folder: (folder / "config.json").write_text("[1]"),
    "unknown architecture": lambda folder: spoil_config(folder, model_type="nothing", architectures=["Nothing"]),
    "a size is text": lambda folder: spoil_config(folder, vocab_size="32"),
    "a size is null": lambda folder: spoil_config(folder, num_hidden_layers=None),
    "heads do not divide the width": lambda folder: spoil_config(folder, num_attention_heads=-3),
    "an empty dtype": lambda folder: spoil_config(folder, dtype=[]),
    "another width": lambda folder: spoil_config(folder, hidden_size=48),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "a weight is missing": lambda folder: without_weight(folder, "model.layers.1.mlp.up_proj.weight"),
    "weights cut short": truncated,
    "weights are text": lambda folder: (folder / "model.safetensors").write_text("hello"),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
}


@pytest.mark.parametrize("name", list(SPOILT))
def test_f25_a_spoilt_folder_is_refused(name: str, folder: Path) -> None:
    SPOILT[name](folder)
    with pytest.raises(ConfigError) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["no-such/model", "./no-such-model", "nothing-here"])
def test_f25_a_name_that_is_nowhere(name: str) -> None:
    with pytest.raises(ConfigError, match="model"):
        load_causal_lm(name)


# ---- code in files ---------------------------------------------------------------------------------------------------


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.ckpt", "model.pkl"])
@pytest.mark.parametrize("loader", [load_causal_lm, load_classifier])
def test_f26_pickled_weights_are_refused(name: str, loader: Callable[[str], Any], folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    with (folder / name).open("wb") as file:
        pickle.dump(Evil(tmp_path / "marker"), file)
    with pytest.raises(ConfigError, match=rf"{name} is a pickle, .* -> convert it"):
        loader(str(folder))
    assert not (tmp_path / "marker").exists()


def test_f26_beside_safetensors_a_pickle_is_not_read(folder: Path, tmp_path: Path) -> None:
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Evil(tmp_path / "marker"), file)
    (folder / "rng_state.pth").write_bytes(pickle.dumps(Evil(tmp_path / "marker")))
    load_causal_lm(str(folder))
    assert not (tmp_path / "marker").exists()


def test_f26_a_pickled_adapter_is_refused(folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(folder), "peft_type": "LORA", "r": 2, "task_type": "CAUSAL_LM"})
    )
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "marker")))
    with pytest.raises(ConfigError, match=r"no adapter_model\.safetensors"):
        load_causal_lm(str(adapter))
    assert not (tmp_path / "marker").exists()


def test_f27_nor_does_that_of_an_adapter(folder: Path, tmp_path: Path) -> None:
    model = with_lora(load_causal_lm(str(folder)), LoraSettings(r=2), "CAUSAL_LM")
    save_adapter(model, load_tokenizer(str(folder)), tmp_path / "adapter")
    (tmp_path / "adapter" / "modeling_x.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
    spoil_config(tmp_path / "adapter", model_type="evil", auto_map={"AutoConfig": "modeling_x.Evil"})
    with pytest.raises(ConfigError, match="comes with Python code"):
        load_causal_lm(str(tmp_path / "adapter"))
    assert not (tmp_path / "marker").exists()


CODE = "from pathlib import Path\nPath({marker!r}).touch()\nclass Evil: pass\n"


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_f27_python_code_of_a_model_never_runs(file: str, folder: Path, tmp_path: Path) -> None:
    (folder / "modeling_x.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
    values = json.loads((folder / file).read_text())
    kind = {"model_type": "evil", "architectures": ["Evil"]} if file == "config.json" else {"tokenizer_class": "Evil"}
    autos = {"AutoConfig": "modeling_x.Evil", "AutoModelForCausalLM": "modeling_x.Evil",
             "AutoTokenizer": ["modeling_x.Evil", None]}  # fmt: skip
    (folder / file).write_text(json.dumps(values | kind | {"auto_map": autos}))
    with pytest.raises(ConfigError):
        load(folder)
    assert not (tmp_path / "marker").exists()


def header(entries: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(start: int, end: int, shape: list[int]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


TWICE = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
ATTACKS = {
    "a header of 2^63 bytes": header(b"{}", length=2**63),
    "a header beyond the file": header(b"{}", length=1000),
    "overlapping tensors": header({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, bytes(12)),
    "a hole": header({"a": tensor(0, 4, [1]), "b": tensor(8, 12, [1])}, bytes(12)),
    "a shape that overflows": header({"a": tensor(0, 4, [2**62, 4])}, bytes(4)),
    "a negative offset": header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, bytes(4)),
    "a name twice": header(b"{" + b",".join([TWICE] * 2) + b"}", bytes(4)),
    "a hundred thousand tensors": header({f"t{i}": tensor(0, 0, [0]) for i in range(100_000)}),
}  # fmt: skip


@pytest.mark.parametrize("name", list(ATTACKS))
def test_f28_hostile_safetensors(name: str, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(ATTACKS[name])
    began = time.monotonic()
    with pytest.raises(ConfigError):
        load_causal_lm(str(folder))
    assert time.monotonic() - began < 10


ENDLESS = "{% for x in range(99999) %}" * 3 + "{% endfor %}" * 3
DOUBLING = "{% set x.y = x.y ~ x.y %}"
TEMPLATES = {
    "never ends": (ENDLESS, "takes more than 5 s or 512 MB"),
    "a gigabyte": ("{{ 'a' * 10**10 }}", "takes more than 5 s or 512 MB"),
    "doubles itself": (
        "{% set x = namespace(y='aaaaaaaa') %}{% for i in range(60) %}" + DOUBLING + "{% endfor %}{{ x.y }}",
        "takes more than 5 s or 512 MB",
    ),
    "long": ("{{ 'a' * 3000000 }}", "writes 3,000,000 characters"),
    "reaches out": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses these messages"),
    "opens a file": ("{{ messages.__init__.__globals__['open']('/etc/passwd').read() }}", "refuses these messages"),
    "imports": ("{% import 'os' as os %}{{ os }}", "refuses these messages"),
}


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_f29_hostile_chat_templates(name: str) -> None:
    template, expected = TEMPLATES[name]
    tokenizer = word_tokenizer("<pad>")
    tokenizer.chat_template = template
    began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with pytest.raises((ConfigError, DataError), match=expected):
        render_chat([{"role": "user", "content": "w1"}], tokenizer)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began < 8


@pytest.mark.parametrize(
    ("job", "pauses", "in_time"),
    [
        (lambda: time.sleep(1.5), 10**6, True),  # as on a machine that is paused: it takes time, but no work
        (lambda: [None for _ in iter(int, 1)], 10**6, False),
        (lambda: time.sleep(300), 100, False),  # it hangs
    ],
    ids=["paused", "endless", "hanging"],
)
@pytest.mark.skipif(sys.platform != "linux", reason="templates are tried on Linux")
def test_f29_a_trial_is_judged_by_its_work(
    job: Callable[[], object], pauses: int, in_time: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "SECONDS", 1)
    monkeypatch.setattr(templates, "POLLS", pauses)
    assert templates.runs_within_limits(job) is in_time


# ---- tokenizers and vocabularies -------------------------------------------------------------------------------------


def test_f19_tokenizers_of_every_kind(tiny_policy: Path, tmp_path: Path) -> None:
    """No pad token, pad = end, another padding side: the run works, with explicit masks, and gives the same."""
    results = []
    kinds = {
        "plain": ("<pad>", "left"),
        "pad is end": ("</s>", "left"),
        "right": ("<pad>", "right"),
        "none": (None, "left"),
    }
    for name, (pad, side) in kinds.items():
        folder = Path(shutil.copytree(tiny_policy, tmp_path / name))
        tokenizer = word_tokenizer(pad or "<pad>")
        tokenizer.pad_token, tokenizer.padding_side = pad, side
        tokenizer.save_pretrained(folder)
        keel.train(settings(folder, tmp_path / f"run-{name}"), [share_of_w3], ["w1 w2", "w5"])
        results.append(load_file(tmp_path / f"run-{name}" / "policy" / "model.safetensors"))
    plain, pad_is_end, *others = results
    assert all(bool(value.isfinite().all()) for value in pad_is_end.values())  # there <pad> is a word like any other
    for other in others:
        assert all(torch.equal(value, other[key]) for key, value in plain.items())


def test_f19_no_end_token(folder: Path, tmp_path: Path) -> None:
    tokenizer = word_tokenizer("<pad>")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    spoil_config(folder, eos_token_id=None)
    (folder / "generation_config.json").unlink()
    with pytest.raises(ConfigError, match="end token"):
        keel.train(settings(folder, tmp_path / "run"), [share_of_w3], ["w1"])


def test_f20_a_reference_of_another_vocabulary(folder: Path, tiny_policy: Path, tmp_path: Path) -> None:
    model = load_causal_lm(str(folder))
    model.resize_token_embeddings(40)
    model.save_pretrained(folder)
    with pytest.raises(KeelError, match="vocabulary") as caught:
        keel.train(settings(tiny_policy, tmp_path / "run", {"reference": str(folder)}), [share_of_w3], ["w1"])
    assert caught.value.exit_code == 2
