"""Adapters: saved alone they score as before, and all of them may stand on one base."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import RecurrentGemmaConfig

from keel.config import LoraSettings, TrainConfig, parse
from keel.errors import ConfigError
from keel.models.adapters import share_frozen_weights
from keel.models.heads import trunk
from keel.models.loading import load_causal_lm, load_tokenizer
from keel.models.reward_model import RewardModel
from keel.rollout.scorers import RewardModelScorer
from keel.training.setup import TrainingSetup, build_training_setup
from keel.world import ALONE

from ..conftest import save_tiny_model
from ..runs import PROMPTS, settings
from ..shapes import SIZES

peft = pytest.importorskip("peft")

RESPONSES = ["w1", "w2 w3", "w4", "w5 w6 w7"]


@pytest.fixture
def adapter(tiny_policy: Path, tmp_path: Path) -> Path:
    """A reward model's adapter that has learned something."""
    model = RewardModel.load(str(tiny_policy), template="{prompt} {response}", lora=LoraSettings(r=2))
    with torch.no_grad():
        for weight in model.model.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn_like(weight))
    model.save(tmp_path / "reward")
    return tmp_path / "reward" / "adapter"


def run(tiny_policy: Path, tmp_path: Path, **changes: Any) -> TrainingSetup:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    given = settings(tiny_policy, tmp_path / "run", {"prompts.path": str(prompts), **changes})
    return build_training_setup(parse(TrainConfig, given), [], None, ALONE)


def places(model: Any) -> dict[str, int]:
    """Where the frozen trunk weights lie."""
    return {
        name.replace(".base_layer.", "."): weight.data_ptr()
        for name, weight in trunk(model).named_parameters()
        if not weight.requires_grad
    }


def test_alone_it_scores_as_merged(adapter: Path) -> None:
    alone, merged = RewardModel.load(str(adapter)), RewardModel.load(str(adapter.parent))
    assert alone.template == merged.template == "{prompt} {response}"
    scores = alone.score(PROMPTS, RESPONSES)
    assert scores.std() > 1e-3
    torch.testing.assert_close(scores, merged.score(PROMPTS, RESPONSES), atol=1e-5, rtol=0)
    assert sum(file.stat().st_size for file in adapter.glob("*.safetensors")) < 100_000


def test_one_that_peft_alone_saved_is_read_too(tiny_policy: Path, adapter: Path) -> None:
    """As other trainers leave them: no config.json, no tokenizer."""
    scores = RewardModel.load(str(adapter), template="{prompt}{response}").score(PROMPTS, RESPONSES)
    for file in adapter.iterdir():
        if not file.name.startswith("adapter"):
            file.unlink()
    model = RewardModel.load(str(adapter))
    assert model.template == "{prompt}{response}"
    torch.testing.assert_close(model.score(PROMPTS, RESPONSES), scores)


def test_a_language_models_adapter_is_merged_at_loading(tiny_policy: Path, tmp_path: Path) -> None:
    learned = load_causal_lm(str(tiny_policy), lora=LoraSettings(r=2))
    with torch.no_grad():
        for weight in learned.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn_like(weight))
    learned.save_pretrained(tmp_path / "adapter")
    model = load_causal_lm(str(tmp_path / "adapter"))
    tokens = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, learned(tokens).logits, atol=1e-5, rtol=0)
        assert not torch.allclose(model(tokens).logits, load_causal_lm(str(tiny_policy))(tokens).logits, atol=1e-2)
    assert not any("lora" in name for name in model.state_dict())
    assert load_tokenizer(str(tmp_path / "adapter")).get_vocab() == load_tokenizer(str(tiny_policy)).get_vocab()


def test_policy_reference_critic_and_reward_model_stand_on_one_base(
    tiny_policy: Path, adapter: Path, tmp_path: Path
) -> None:
    setup = run(tiny_policy, tmp_path, **{"policy.lora": {"r": 2}, "rewards": [{"model": str(adapter)}]})
    [scorer] = setup.scorers
    assert isinstance(scorer, RewardModelScorer)
    assert setup.reference is not None
    assert setup.reference.policy is setup.actor_critic.policy
    base = places(load_causal_lm(str(tiny_policy)).requires_grad_(False))
    own = places(setup.actor_critic.policy)
    assert own.keys() == base.keys()
    assert places(setup.actor_critic.critic) == own
    assert {name: place for name, place in places(scorer.members[0].model).items() if "lora" not in name} == own


def test_with_a_full_policy_an_adapter_stands_on_the_reference(
    tiny_policy: Path, adapter: Path, tmp_path: Path
) -> None:
    setup = run(tiny_policy, tmp_path, rewards=[{"model": str(adapter)}])
    [scorer] = setup.scorers
    assert isinstance(scorer, RewardModelScorer)
    assert setup.reference is not None
    shared = places(scorer.members[0].model)
    assert places(setup.reference.policy).items() <= shared.items()


def test_sharing_changes_no_score_and_takes_only_equal_frozen_weights(tiny_policy: Path, adapter: Path) -> None:
    model = RewardModel.load(str(adapter))
    scores = model.score(PROMPTS, RESPONSES)
    other = load_causal_lm(str(tiny_policy)).requires_grad_(False)
    with torch.no_grad():
        changed = dict(trunk(other).named_parameters())["layers.0.mlp.up_proj.weight"]
        changed.add_(1.0)
    model.model.requires_grad_(False)
    share_frozen_weights(model.model, other)
    own = places(model.model)
    differ = {name for name, place in places(other).items() if own[name] != place}
    assert differ == {"layers.0.mlp.up_proj.weight"}
    torch.testing.assert_close(model.score(PROMPTS, RESPONSES), scores, atol=0, rtol=0)


def test_an_adapter_of_nothing(adapter: Path) -> None:
    place = adapter / "adapter_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match="does not name the model"):
        RewardModel.load(str(adapter))


def test_one_is_merged_into_a_model_that_cannot_make_its_own_cache(tmp_path: Path) -> None:
    """RecurrentGemma raises there."""
    sizes = SIZES | {"vocab_size": 32, "lru_width": 16, "max_position_embeddings": 256}
    config = RecurrentGemmaConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    folder = save_tiny_model(config, "<pad>", tmp_path / "base")
    learned = load_causal_lm(str(folder), lora=LoraSettings(r=2))
    learned.save_pretrained(tmp_path / "adapter")
    weights = load_causal_lm(str(tmp_path / "adapter")).state_dict()
    assert weights.keys() == load_causal_lm(str(folder)).state_dict().keys()


def test_a_layer_that_is_not_there_is_refused_beside_one_that_is(tiny_policy: Path) -> None:
    for targets in (["q_proj", "linear_fc1x"], ["self_attn.q_proj", "proj"], ["nothing"]):
        with pytest.raises(ConfigError) as caught:
            load_causal_lm(str(tiny_policy), lora=LoraSettings(r=2, target_modules=targets))
        assert caught.value.where == "lora.target_modules"
    model = load_causal_lm(str(tiny_policy), lora=LoraSettings(r=2, target_modules=["self_attn.q_proj", "v_proj"]))
    adapted = {name.rpartition(".")[0].rpartition(".")[2] for name, _ in model.named_modules() if "lora_A" in name}
    assert {"q_proj", "v_proj"} <= adapted
