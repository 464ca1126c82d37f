"""A part that must have been trained is never made up, and what a file holds beyond the model is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from keel.config import LoraSettings
from keel.errors import ConfigError
from keel.models.ensemble import load_reward_model
from keel.models.loading import load_causal_lm, load_classifier, load_tokenizer
from keel.models.model_files import ADAPTER
from keel.models.reward_model import RewardModel

from ..conftest import word_tokenizer


def change(folder: Path, edit: Callable[[dict[str, Any]], Any], file: str = "model.safetensors") -> Path:
    """The same folder with other weights."""
    weights = load_file(folder / file)
    edit(weights)
    save_file(weights, folder / file, {"format": "pt"})
    return folder


@pytest.fixture
def scorer(tiny_policy: Path, tmp_path: Path) -> Path:
    """A reward model whose head was trained."""
    model = RewardModel.load(str(tiny_policy), template="{prompt} {response}")
    torch.nn.init.normal_(model.head.weight)
    model.save(tmp_path / "scorer")
    return tmp_path / "scorer"


@pytest.fixture
def policy(tiny_policy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_policy, tmp_path / "policy"))


def renamed(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda weights: weights.update({name: weights.pop("score.weight")})


@pytest.mark.parametrize("name", ["value_head.weight", "v_head.summary.weight"])
@pytest.mark.parametrize("to_train", [False, True])
def test_a_classifier_without_its_head_is_refused_and_the_head_of_another_name_is_named(
    scorer: Path, name: str, to_train: bool
) -> None:
    change(scorer, renamed(name))
    with pytest.raises(ConfigError) as caught:
        load_classifier(str(scorer), to_train=to_train)
    assert "score.weight" in caught.value.what
    assert name in caught.value.what
    assert caught.value.where == str(scorer)


def test_a_language_model_is_no_scorer_but_the_start_of_one(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"score\.weight"):
        RewardModel.load(str(policy))
    change(policy, lambda weights: weights.update({"v_head.summary.weight": torch.ones(1, 32)}))
    (policy / "value_head.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"v_head\.summary\.weight, value_head\.bin"):
        RewardModel.load(str(policy))
    assert not load_classifier(str(policy), to_train=True).score.weight.any()
    assert "v_head.summary.weight" in capsys.readouterr().err


def test_an_encoder_that_only_speaks_is_no_scorer(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    BertForMaskedLM(BertConfig(**sizes, intermediate_size=16)).save_pretrained(tmp_path)
    word_tokenizer("<pad>").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"bert\.pooler\.dense\.bias.* and 1 more"):
        load_classifier(str(tmp_path))
    load_classifier(str(tmp_path), to_train=True)


def test_what_is_new_below_an_encoders_head_is_saved_with_the_adapter(tmp_path: Path) -> None:
    """A pooler that no file holds is random: an adapter that is saved without it would score at random."""
    pytest.importorskip("peft")
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    BertForMaskedLM(BertConfig(**sizes, intermediate_size=16)).save_pretrained(tmp_path / "base")
    word_tokenizer("<pad>").save_pretrained(tmp_path / "base")
    model = RewardModel.load(str(tmp_path / "base"), template="{prompt} {response}", lora=LoraSettings(r=2))
    for weight in model.model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.2)
    model.save(tmp_path / "reward")
    assert any("pooler" in key for key in load_file(tmp_path / "reward" / "adapter" / FILE))
    with torch.random.fork_rng():
        torch.manual_seed(99)
        again = RewardModel.load(str(tmp_path / "reward" / "adapter"))
    torch.testing.assert_close(again.score(["w1"], ["w2"]), model.score(["w1"], ["w2"]), atol=1e-5, rtol=0)


def test_a_new_head_leaves_the_trunk_as_it_was(tmp_path: Path) -> None:
    """Qwen2-MoE gates its shared expert by a layer of one output, which is no head."""
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 8, "vocab_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 2, "num_experts_per_tok": 1}
    config = Qwen2MoeConfig(**sizes, moe_intermediate_size=8, shared_expert_intermediate_size=8)
    Qwen2MoeForCausalLM(config).save_pretrained(tmp_path)
    trunks = [load_causal_lm(str(tmp_path)).model, load_classifier(str(tmp_path), to_train=True).model]
    one, other = (trunk.state_dict() for trunk in trunks)
    assert any("shared_expert_gate" in name for name in one)
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_a_head_over_a_part_that_no_file_holds_is_refused(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    config = BertConfig(**sizes, intermediate_size=16, num_labels=1)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    change(tmp_path, lambda weights: weights.pop("bert.pooler.dense.weight"))
    with pytest.raises(ConfigError, match=r"bert\.pooler\.dense\.weight"):
        load_classifier(str(tmp_path))


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_reward_model_whose_head_is_zero_is_refused(tmp_path: Path, tiny_policy: Path, kind: str) -> None:
    """It has every weight, and scores all texts alike."""
    source = tiny_policy
    if kind == "encoder":
        sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
        source = tmp_path / "base"
        BertForMaskedLM(BertConfig(**sizes, intermediate_size=16)).save_pretrained(source)
        word_tokenizer("<pad>").save_pretrained(source)
    RewardModel.load(str(source), template="{prompt} {response}").save(tmp_path / "untrained")
    with pytest.raises(ConfigError) as refused:
        load_reward_model(str(tmp_path / "untrained"))
    assert refused.value.where == str(tmp_path / "untrained")


def test_experts_of_another_size_are_refused_with_their_name(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 8, "vocab_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 12}))
    with pytest.raises(ConfigError, match=r"experts"):
        load_causal_lm(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_local_experts": 3}))
    with pytest.raises(ConfigError, match=r"experts|gate"):
        load_causal_lm(str(tmp_path))


def test_a_classifier_of_two_labels_is_refused_with_both_shapes(scorer: Path) -> None:
    change(scorer, lambda weights: weights.update({"score.weight": torch.ones(2, 32)}))
    with pytest.raises(ConfigError, match=r"score\.weight has shape \[2, 32\] in the file, but \[1, 32\]"):
        load_classifier(str(scorer))


def test_a_config_of_other_sizes_is_refused_with_tensor_and_shapes(policy: Path) -> None:
    config = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    for load in (load_causal_lm, load_classifier):
        with pytest.raises(ConfigError) as caught:
            load(str(policy))
        assert "model.layers.0.mlp.down_proj.weight has shape [32, 64] in the file, but [32, 48]" in caught.value.what


def test_weights_of_no_module_are_named(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra = {"model.layers.2.mlp.up_proj.weight": torch.ones(64, 32), "model.norm.bias": torch.ones(32)}
    load_causal_lm(str(change(policy, lambda weights: weights.update(extra))))
    assert "model.layers.2.mlp.up_proj.weight, model.norm.bias" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("load", [load_causal_lm, load_classifier, RewardModel.load])
def test_weights_that_are_no_numbers_are_named(scorer: Path, policy: Path, load: Any, value: float) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    folder = policy if load is load_causal_lm else scorer
    change(folder, lambda weights: weights[name].view(-1)[:3].fill_(value))
    with pytest.raises(ConfigError, match=rf"{name} has 3 values") as caught:
        load(str(folder))
    assert caught.value.where == str(folder)


@pytest.fixture
def adapter(tiny_policy: Path, tmp_path: Path) -> Path:
    """A reward model's adapter."""
    pytest.importorskip("peft")
    model = RewardModel.load(str(tiny_policy), template="{prompt} {response}", lora=LoraSettings(r=2))
    for weight in model.model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1)
    model.save(tmp_path / "reward")
    return tmp_path / "reward" / "adapter"


FILE = "adapter_model.safetensors"
SPOILT: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no head": (lambda weights: weights.pop("base_model.model.score.weight"), "score.weight"),
    "a weight is missing": (lambda weights: weights.pop(sorted(weights)[0]), "self_attn|mlp"),
    "not a number": (lambda weights: weights[sorted(weights)[0]].fill_(float("nan")), "NaN"),
}


@pytest.mark.parametrize("kind", list(SPOILT))
@pytest.mark.parametrize("to_train", [False, True])
def test_a_spoilt_adapter_is_refused(adapter: Path, kind: str, to_train: bool) -> None:
    edit, named = SPOILT[kind]
    change(adapter, edit, FILE)
    with pytest.raises(ConfigError, match=named):
        load_classifier(str(adapter), to_train=to_train)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "FEATURE_EXTRACTION", None])
def test_an_adapter_that_was_saved_without_a_head_is_no_scorer(adapter: Path, task: str | None) -> None:
    change(adapter, SPOILT["no head"][0], FILE)
    settings = json.loads((adapter / ADAPTER).read_text()) | {"task_type": task, "modules_to_save": None}
    (adapter / ADAPTER).write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"score\.weight"):
        load_classifier(str(adapter))


def test_an_adapter_of_itself_is_refused(adapter: Path) -> None:
    settings = json.loads((adapter / ADAPTER).read_text())
    (adapter / ADAPTER).write_text(json.dumps(settings | {"base_model_name_or_path": str(adapter)}))
    with pytest.raises(ConfigError, match="the adapter itself"):
        load_classifier(str(adapter))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/hosts", "weights.bin", "none.safetensors"])
def test_an_index_names_files_of_its_folder_only(policy: Path, name: str) -> None:
    (policy / "model.safetensors").rename(policy.parent / "model.safetensors")
    index = policy / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": name}}))
    with pytest.raises(ConfigError, match=Path(name).name):
        load_causal_lm(str(policy))


def test_the_tokenizer_of_a_scorer_is_saved_with_it(scorer: Path) -> None:
    assert load_tokenizer(str(scorer)).get_vocab() == word_tokenizer("<pad>").get_vocab()
    assert AutoModelForSequenceClassification.from_pretrained(scorer).config.num_labels == 1
