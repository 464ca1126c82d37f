"""A head on the trunk of families without a sequence classifier in transformers; configs that wrap a text config."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

from keel.config import RewardConfig, TrainConfig, parse
from keel.errors import ConfigError
from keel.models.heads import new_value_head
from keel.models.loading import as_classifier, load_causal_lm, load_classifier, load_tokenizer, save_model
from keel.models.reward_model import RewardModel
from keel.models.trunk_classifier import SequenceClassifier, TrunkClassifier, has_score_head
from keel.supervised.reward import reward
from keel.training.policy import train_policy

from ..conftest import word_tokenizer
from ..runs import PROMPTS, settings, share_of_w3

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
GEMMA = SIZES | {"head_dim": 8, "sliding_window": 8, "initializer_range": 0.2}
LLAMA_4 = {"intermediate_size_mlp": 24, "num_local_experts": 2, "head_dim": 8, "initializer_range": 0.2}


def config_of(family: str) -> PreTrainedConfig:
    made: dict[str, Any] = {
        "granite": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=4.0, initializer_range=0.2),
        "gemma3": lambda: transformers.Gemma3Config(
            text_config=GEMMA | {"query_pre_attn_scalar": 8},
            vision_config=VISION | {"patch_size": 14},
            eos_token_id=[2],
        ),
        "gemma4": lambda: transformers.Gemma4TextConfig(
            **GEMMA, hidden_size_per_layer_input=8, vocab_size_per_layer_input=32, num_kv_shared_layers=0
        ),
    }[family]()
    found: PreTrainedConfig = made
    return found


FAMILIES = ["granite", "gemma3", "gemma4"]


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return saved(config_of(request.param), tmp_path / request.param)


def saved(config: PreTrainedConfig, folder: Path) -> Path:
    """A config that wraps a text config has no special tokens of its own, so none are set here."""
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    word_tokenizer("<pad>").save_pretrained(folder)
    return folder


def rows(tmp_path: Path) -> str:
    path = tmp_path / "pairs.jsonl"
    pair = {"prompt": "w0", "chosen": " w1 w2", "rejected": " w3"}
    path.write_text("".join(json.dumps(pair | {"prompt": f"w{i}"}) + "\n" for i in range(6)))
    return str(path)


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_a_reward_model_is_trained_saved_loaded_and_scores(model: Path, lora: Any, tmp_path: Path) -> None:
    if lora:
        pytest.importorskip("peft")
    given = {"output": str(tmp_path / "rm"), "model": str(model), "data": {"path": rows(tmp_path)}, "batch_size": 3}
    reward(parse(RewardConfig, {**given, "optim": {"learning_rate": 0.01}, "epochs": 1, "lora": lora}))
    scorer = RewardModel.load(str(tmp_path / "rm" / "model"))
    texts = ["w1 w2", "w3", "w4 w5 w6 w7", ""]
    scores = scorer.score(PROMPTS, texts)
    assert scores.unique().numel() == 4
    alone = [scorer.score([prompt], [text])[0] for prompt, text in zip(PROMPTS, texts, strict=True)]
    torch.testing.assert_close(scores, torch.stack(alone), atol=1e-5, rtol=0)
    config = parse(
        RewardConfig,
        {**given, "output": str(tmp_path / "next"), "model": str(tmp_path / "rm" / "model"), "epochs": 0.1},
    )
    reward(config)  # and is the start of another


@pytest.mark.parametrize("sharing", ["separate", "shared"])
def test_a_critic_is_trained_saved_and_loaded(model: Path, sharing: str, tmp_path: Path) -> None:
    changes = {"critic.sharing": sharing, "steps": 1}
    train_policy(parse(TrainConfig, settings(model, tmp_path / "run", changes)), [share_of_w3], PROMPTS)
    critic = load_classifier(str(tmp_path / "run" / "critic"))
    assert critic.score.weight.any()
    assert "keel_value_offset" in critic.config.to_dict()


def test_the_class_is_one_of_transformers_where_there_is_one(tiny_policy: Path) -> None:
    assert not isinstance(load_classifier(str(tiny_policy), to_train=True), TrunkClassifier)
    assert isinstance(SequenceClassifier.from_config(config_of("granite")), TrunkClassifier)


def test_a_trunk_that_has_no_prefix_of_its_own_is_found(tmp_path: Path) -> None:
    """`base_model_prefix` of Llama 4's text model names an attribute that it does not have."""
    config = transformers.Llama4TextConfig(**SIZES, **LLAMA_4)
    language_model = AutoModelForCausalLM.from_config(config)
    classifier = SequenceClassifier.from_config(config)
    assert type(classifier.base_model) is type(language_model.model)


def test_a_head_reads_the_last_token_that_is_no_pad_token(tmp_path: Path) -> None:
    folder = saved(config_of("granite"), tmp_path)
    head = torch.nn.Linear(16, 1, bias=False)
    model = as_classifier(load_causal_lm(str(folder)), head, 0)
    with torch.no_grad():
        short, long = model(torch.tensor([[5, 6, 0, 0]])).logits, model(torch.tensor([[5, 6]])).logits
        states = model.base_model(torch.tensor([[5, 6]])).last_hidden_state
        torch.testing.assert_close(short, head(states[:, -1]))
        torch.testing.assert_close(short, long)


def test_a_critic_that_could_not_be_saved_is_refused_before_the_run(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert has_score_head(transformers.LlamaConfig())
    assert not has_score_head(transformers.CTRLConfig())  # its classifier has a layer of another name
    monkeypatch.setattr("keel.training.critic.has_score_head", lambda config: False)
    changes = {"critic.sharing": "shared"}
    with pytest.raises(ConfigError, match="only a decoder can be a critic"):
        train_policy(parse(TrainConfig, settings(tiny_policy, tmp_path / "run", changes)), [share_of_w3], PROMPTS)
    assert not (tmp_path / "run").exists()


def test_a_head_on_a_decoder_in_a_wrapper(tmp_path: Path) -> None:
    """Marian's decoder is in a module that does not say where its embeddings are."""
    parts = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in PARTS.items()}
    config = transformers.MarianConfig(**parts, vocab_size=32, d_model=16, pad_token_id=0, eos_token_id=2, init_std=0.2)
    folder = saved(config, tmp_path / "marian")
    word_tokenizer("</s>").save_pretrained(folder)  # so that a pad token is added, and the embeddings grow
    scorer = RewardModel.load(str(folder), template="{prompt} {response}")
    expected = load_causal_lm(str(folder)).get_input_embeddings().weight
    assert torch.equal(scorer.model.get_input_embeddings().weight[: len(expected)], expected)
    torch.nn.init.normal_(scorer.head.weight)
    assert scorer.score(["w1", "w1"], ["w2", "w3 w4"]).unique().numel() == 2


PARTS = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}


def test_a_shared_critic_of_a_model_that_was_saved(tmp_path: Path) -> None:
    """Saving leaves the name of the type in the config, which Apertus's activation does not take."""
    model = load_causal_lm(str(saved(transformers.ApertusConfig(**SIZES), tmp_path / "apertus")))
    save_model(model, load_tokenizer(str(tmp_path / "apertus")), tmp_path / "policy")
    critic = as_classifier(model, new_value_head(model), 0)
    assert critic.dtype == torch.float32
