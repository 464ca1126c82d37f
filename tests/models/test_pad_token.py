"""The end token of a template is read, whatever the pad token is, by keel and by plain transformers alike."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    YoutuConfig,
)

from keel.config import LoraSettings, TrainConfig, parse
from keel.models.loading import as_classifier, load_causal_lm, load_classifier, load_tokenizer, save_model
from keel.models.reward_model import RewardModel
from keel.training.policy import train_policy
from keel.training.setup import build_training_setup
from keel.world import ALONE

from ..conftest import SPECIALS, WORDS, save_tiny_model, word_tokenizer
from ..runs import PROMPTS, settings

END = 2
RESPONSES = ["w1 w2 w3", "w3", "w5 w6", ""]
WITHOUT, WITH = "{prompt} {response}", "{prompt} {response} </s>"


def llama(folder: Path, pad_id: int | None) -> Path:
    config = LlamaConfig(
        vocab_size=len(SPECIALS + WORDS) + 2,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=pad_id,
        bos_token_id=1,
        eos_token_id=END,
    )
    return save_tiny_model(config, "</s>", folder)


def llama_3(folder: Path) -> Path:
    """pad = the end token, and special tokens for other uses."""
    llama(folder, END)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reserved = ["<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": reserved})
    tokenizer.save_pretrained(folder)
    return folder


def no_pad(folder: Path) -> Path:
    llama(folder, None)
    file = folder / "tokenizer_config.json"
    saved = json.loads(file.read_text())
    del saved["pad_token"]
    file.write_text(json.dumps(saved))
    assert AutoTokenizer.from_pretrained(folder).pad_token is None
    return folder


@pytest.fixture(params=["gpt2", "llama 3", "no pad"])
def folder(request: pytest.FixtureRequest, tiny_gpt2: Path, tmp_path: Path) -> Path:
    makers = {"gpt2": lambda path: tiny_gpt2, "llama 3": llama_3, "no pad": no_pad}
    return makers[request.param](tmp_path / "model")


def with_head(model: RewardModel) -> RewardModel:
    with torch.no_grad():
        model.head.weight.copy_(torch.randn(model.head.weight.shape, generator=torch.Generator().manual_seed(3)))
    return model


def plain_scores(folder: Path, template: str) -> tuple[list[float], list[float]]:
    """Of plain transformers: each text alone, and all of them in one padded batch."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    texts = [template.format(prompt=p, response=r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    with torch.no_grad():
        alone = [float(model(**tokenizer(text, return_tensors="pt")).logits[0, 0]) for text in texts]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        assert not batch["attention_mask"].all()
        return alone, model(**batch).logits[:, 0].tolist()


def test_the_end_token_of_a_template_is_read(folder: Path, tmp_path: Path) -> None:
    scores = []
    for template, name in ((WITHOUT, "without"), (WITH, "with")):
        model = with_head(RewardModel.load(str(folder), template=template))
        scores.append(model.score(PROMPTS, RESPONSES).tolist())
        model.save(tmp_path / name)
        alone, padded = plain_scores(tmp_path / name, template)
        assert scores[-1] == pytest.approx(alone, abs=1e-5)
        assert scores[-1] == pytest.approx(padded, abs=1e-5)
        assert RewardModel.load(str(tmp_path / name)).score(PROMPTS, RESPONSES).tolist() == pytest.approx(
            alone, abs=1e-5
        )
    short, long = (RewardModel.load(str(tmp_path / name)).encode("w1", "w2") for name in ("without", "with"))
    assert (short, long) == ([5, 6], [5, 6, END])
    assert all(abs(one - other) > 1e-3 for one, other in zip(*scores, strict=True))


def test_a_spare_token_is_preferred_to_a_new_one(tiny_policy: Path, tiny_gpt2: Path, tmp_path: Path) -> None:
    pads = {}
    for name, folder in (("own", tiny_policy), ("spare", llama_3(tmp_path / "m")), ("new", tiny_gpt2)):
        model = RewardModel.load(str(folder), template=WITH)
        pads[name] = (model.tokenizer.pad_token, model.model.config.pad_token_id, model.model.config.vocab_size)
    assert pads == {
        "own": ("<pad>", 0, 32),
        "spare": ("<|finetune_right_pad_id|>", 33, 34),
        "new": ("<|pad|>", 32, 33),
    }


@pytest.mark.parametrize("pad_id", [END, None])
def test_a_trained_model_from_elsewhere_is_read_where_transformers_reads_it(pad_id: int | None, tmp_path: Path) -> None:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"vocab_size": 32, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    model = GPT2ForSequenceClassification(
        GPT2Config(**sizes, num_labels=1, pad_token_id=pad_id, eos_token_id=END)
    ).eval()
    model.save_pretrained(tmp_path)
    word_tokenizer("</s>").save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[5, 6, END]])).logits[0, 0].item()
        cut_short = model(input_ids=torch.tensor([[5, 6]])).logits[0, 0].item()
    assert (abs(expected - cut_short) < 1e-6) is (pad_id == END)
    assert RewardModel.load(str(tmp_path)).score(["w1"], [" w2 </s>"]).tolist() == pytest.approx([expected], abs=1e-5)


def test_an_adapter_that_needs_a_new_pad_token_scores_alone_as_merged(tiny_gpt2: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = with_head(RewardModel.load(str(tiny_gpt2), template=WITH, lora=LoraSettings(r=2)))
    model.save(tmp_path / "reward")
    scores = model.score(PROMPTS, RESPONSES)
    for folder in (tmp_path / "reward", tmp_path / "reward" / "adapter"):
        torch.testing.assert_close(RewardModel.load(str(folder)).score(PROMPTS, RESPONSES), scores, atol=1e-5, rtol=0)
    assert sum(file.stat().st_size for file in (tmp_path / "reward" / "adapter").glob("*.safetensors")) < 50_000
    alone, padded = plain_scores(tmp_path / "reward", WITH)
    assert scores.tolist() == pytest.approx(alone, abs=1e-5)
    assert scores.tolist() == pytest.approx(padded, abs=1e-5)


def test_a_critic_that_starts_from_such_a_model_is_saved_with_the_policys_pad_token(
    tiny_gpt2: Path, tmp_path: Path
) -> None:
    with_head(RewardModel.load(str(tiny_gpt2), template=WITH)).save(tmp_path / "reward")
    changes = {"rewards": [{"model": str(tmp_path / "reward")}], "critic.init": "reward", "steps": 1}
    train_policy(parse(TrainConfig, settings(tiny_gpt2, tmp_path / "run", changes)), [], PROMPTS)
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "critic")
    assert saved.config.pad_token_id == AutoTokenizer.from_pretrained(tmp_path / "run" / "critic").pad_token_id == END


def test_a_shared_critic_is_saved_with_the_tokenizers_pad_token(tmp_path: Path) -> None:
    model = load_causal_lm(str(llama(tmp_path, 0)))
    assert as_classifier(model, torch.nn.Linear(32, 1, bias=False), 7).config.pad_token_id == 7


@pytest.mark.parametrize("load", [load_causal_lm, partial(load_classifier, to_train=True)])
def test_an_end_token_that_is_the_pad_token_learns(load: Any, tmp_path: Path) -> None:
    """torch gives the embedding of `padding_idx` no gradient, even where the mask says that it is text."""
    model = load(str(llama(tmp_path, END)))
    states = model.base_model(input_ids=torch.tensor([[5, END, 6]])).last_hidden_state
    states[:, -1].sum().backward()
    assert model.get_input_embeddings().weight.grad[END].abs().sum() > 0


def test_a_vocabulary_with_a_pad_token_besides_is_the_policys(tiny_gpt2: Path, tmp_path: Path) -> None:
    with_head(RewardModel.load(str(tiny_gpt2), template=WITH)).save(tmp_path / "reward")
    assert len(load_tokenizer(str(tmp_path / "reward"))) == 33
    changes = {"rewards": [{"model": str(tmp_path / "reward")}], "critic.init": str(tmp_path / "reward")}
    setup = build_training_setup(parse(TrainConfig, settings(tiny_gpt2, tmp_path / "run", changes)), [], PROMPTS, ALONE)
    assert setup.actor_critic.critic.config.pad_token_id == END


@pytest.mark.parametrize("tied", [True, False])
def test_a_row_that_loading_sets_to_zero_does_not_learn(tied: bool, tmp_path: Path) -> None:
    """transformers does so with Youtu's pad token, whatever the file holds."""
    heads = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_attention_heads": 2}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_key_value_heads": 2}
    tokens = {"vocab_size": len(SPECIALS + WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END}
    config = YoutuConfig(**heads, **sizes, **tokens, kv_lora_rank=8, q_lora_rank=8, tie_word_embeddings=tied)
    folder = save_tiny_model(config, "<pad>", tmp_path / "base")
    model, text = load_causal_lm(str(folder)), torch.tensor([[1, 0, 4, 5]])
    model(text).logits.square().sum().backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight.sub_(weight.grad.clamp(-0.1, 0.1))
    save_model(model, load_tokenizer(str(folder)), tmp_path / "trained")
    saved = load_causal_lm(str(tmp_path / "trained"))
    assert torch.equal(saved(text).logits, model(text).logits)
