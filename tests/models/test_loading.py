"""Loading models: what lies in a file under another name is found, what is missing is said."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from keel.errors import ConfigError
from keel.models.bfloat16 import prepare_bfloat16
from keel.models.loading import (
    end_token_ids,
    load_causal_lm,
    load_classifier,
    load_tokenizer,
    stop_texts,
)


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """A language model whose file holds the tied embedding as `lm_head.weight` only, as some on the hub do."""
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def test_a_classifier_finds_the_tied_embedding(tied: Path) -> None:
    expected = load_file(tied / "model.safetensors")["lm_head.weight"]
    assert torch.equal(load_classifier(str(tied), to_train=True).get_input_embeddings().weight, expected)


def test_a_missing_weight_is_no_random_weight(tied: Path) -> None:
    weights = load_file(tied / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"weights are missing, such as model\.layers\.0\.mlp\.up_proj"):
        load_classifier(str(tied), to_train=True)


@pytest.mark.parametrize("part", ["policy", "model"])
def test_a_run_folder_is_told_from_its_model(tmp_path: Path, part: str):
    (tmp_path / part).mkdir()
    (tmp_path / part / "config.json").write_text("{}")
    with pytest.raises(ConfigError) as error:
        load_tokenizer(str(tmp_path))
    assert error.value.fix == f"name its {part}: {tmp_path / part}"


def test_a_path_that_is_not_there_is_no_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/nosuch", "./nosuch", "runs/a/policy"):
        with pytest.raises(ConfigError, match="no such model folder"):
            load_tokenizer(name)


def test_a_stop_text_is_found_by_its_spelling(tied: Path) -> None:
    """A tokenizer of the Llama kind encodes "." as two tokens, a space before it; "a" is the word with its space."""
    vocabulary = {"<unk>": 0, "</s>": 1, "\u2581": 2, ".": 3, "\u2581a": 4, "a": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("\u2581", "a")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    model = LlamaForCausalLM.from_pretrained(tied)
    model.generation_config.eos_token_id = 1
    assert end_token_ids(model, wrapped, ["."]) == [1, 3]
    assert end_token_ids(model, wrapped, ["a"]) == [1, 4]
    assert end_token_ids(model, wrapped, ["a."]) == [1]
    assert stop_texts(wrapped, [".", "a."]) == ["a."]
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    known = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    with pytest.raises(ConfigError) as refused:
        stop_texts(known, ["END"], where="sampling.stop")
    assert refused.value.where == "sampling.stop"


def test_a_pad_token_beyond_the_embeddings_is_refused(tied: Path) -> None:
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(config | {"pad_token_id": 16}))
    for load in (load_causal_lm, load_classifier):
        with pytest.raises(ConfigError, match="pad_token_id"):
            load(str(tied))


def test_weights_that_are_cut_off_are_refused(tied: Path) -> None:
    file = tied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError) as error:
        load_causal_lm(str(tied))
    assert (error.value.where, bool(error.value.fix)) == (str(tied), True)


def test_a_torn_generation_config_is_not_left_out(tied: Path) -> None:
    (tied / "generation_config.json").write_text('{"eos_token_id": [1, ')
    with pytest.raises(ConfigError) as error:
        load_causal_lm(str(tied))
    assert error.value.where == str(tied / "generation_config.json")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eos_token_id", "1"),
        ("eos_token_id", ["1", "2"]),
        ("eos_token_id", 1.0),
        ("eos_token_id", True),
        ("eos_token_id", [[1]]),
        ("eos_token_id", {}),
        ("eos_token_id", -2),
        ("eos_token_id", 10_000_000),
        ("bos_token_id", "1"),
        ("pad_token_id", ["0"]),
    ],
)
def test_an_id_that_is_none_is_refused_by_file_and_key(tied: Path, name: str, key: str, value: Any) -> None:
    file = tied / name
    settings = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(settings | {key: value}))
    for load in (load_tokenizer, load_causal_lm, load_classifier):
        with pytest.raises(ConfigError, match=key) as refused:
            load(str(tied))
        assert (refused.value.where, bool(refused.value.fix)) == (str(file), True)


@pytest.mark.parametrize("value", [2, [2], [2, 10_000_000], [-1, 2], None])
def test_ids_that_are_some_are_read(tiny_policy: Path, tmp_path: Path, value: Any) -> None:
    folder = Path(shutil.copytree(tiny_policy, tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert 2 in end_token_ids(load_causal_lm(str(folder)), load_tokenizer(str(folder)))


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_a_pipe_in_place_of_the_settings_is_named(tied: Path, name: str) -> None:
    (tied / "config.json").unlink()
    os.mkfifo(tied / name)
    with pytest.raises(ConfigError) as error:
        load_causal_lm(str(tied))
    assert error.value.where == str(tied / name)


def test_an_end_token_below_zero_is_none(tied: Path, tiny_policy: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tied)
    model.generation_config.eos_token_id = [-1, 2]
    assert end_token_ids(model, load_tokenizer(str(tiny_policy))) == [2]


@pytest.mark.parametrize("supported", [True, False])
def test_bfloat16_on_a_processor_without_it_is_reported_once(
    supported: bool, tied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    prepare_bfloat16.cache_clear()
    load_causal_lm(str(tied))
    assert capsys.readouterr().err == ""
    load_causal_lm(str(tied), "bfloat16")
    load_classifier(str(tied), "bfloat16", to_train=True)
    assert capsys.readouterr().err.count("-> use float32") == (0 if supported else 1)
    prepare_bfloat16.cache_clear()
