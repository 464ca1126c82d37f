"""What a stage saves is what it trained: compared on fixed tokens, with adapters and without, tied and not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

from keel.config import DpoConfig, LoraSettings, RewardConfig, SftConfig, TrainConfig, parse
from keel.errors import CheckpointError
from keel.models.loading import load_causal_lm, load_classifier, load_tokenizer, save_model
from keel.models.reward_model import RewardModel
from keel.supervised.dpo import dpo
from keel.supervised.reward import reward
from keel.supervised.sft import sft
from keel.training.policy import train_policy

from ..conftest import save_tiny_model
from ..runs import PROMPTS, settings

TOKENS = torch.tensor([[3, 4, 5, 6, 20, 31, 8]])
ROWS = [{"prompt": f"w{i}", "completion": " w1 w2", "chosen": " w1 w2", "rejected": " w3"} for i in range(4)]


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return save_tiny_model(config, "<pad>", tmp_path / "tied")


def disturbed(model: Any) -> Any:
    """The model after it has learned something."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(TOKENS).logits
    return found


TARGETS: list[Any] = [["q_proj", "lm_head"], ["q_proj", "embed_tokens"], ["lm_head", "embed_tokens"], "all-linear"]


@pytest.mark.parametrize("targets", TARGETS)
def test_an_adapter_on_tied_embeddings_is_saved_as_it_was_trained(targets: Any, tied: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    base = logits(load_causal_lm(str(tied)))
    model = disturbed(load_causal_lm(str(tied), lora=LoraSettings(r=2, target_modules=targets)))
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base)
    trained = logits(model)
    assert (trained - base).abs().max() > 0.1
    save_model(model, load_tokenizer(str(tied)), tmp_path / "saved")
    saved = load_causal_lm(str(tmp_path / "saved"))
    torch.testing.assert_close(logits(saved), trained, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(model), trained, atol=0, rtol=0)
    assert saved.config.tie_word_embeddings is (targets == "all-linear")


@pytest.mark.parametrize("ensure", [False, True])
@pytest.mark.parametrize("targets", [*TARGETS[:3], "modules_to_save", "trainable_tokens"])
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings", "ignore:Setting `save_embedding_layers`")
def test_an_adapter_of_peft_on_tied_embeddings_is_loaded_as_it_was(
    targets: Any, ensure: bool, tied: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    options: dict[str, Any] = {"target_modules": targets}
    if targets == "modules_to_save":
        options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    elif targets == "trainable_tokens":
        options = {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [4, 20]}}
    if ensure and targets != "modules_to_save":
        pytest.skip("peft ties copies alone")
    lora = peft.LoraConfig(r=2, task_type="CAUSAL_LM", ensure_weight_tying=ensure, **options)
    model = disturbed(peft.get_peft_model(load_causal_lm(str(tied)), lora).eval())
    trained = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(load_causal_lm(str(tmp_path / "adapter"))), trained, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_with_tokens_of_its_own_is_loaded_as_it_was(tiny_policy: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = load_causal_lm(str(tiny_policy))
    base.resize_token_embeddings(36, mean_resizing=False)
    lora = peft.LoraConfig(
        r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    model = disturbed(peft.get_peft_model(base, lora).eval())
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_causal_lm(str(tmp_path / "adapter"))
    tokens = torch.tensor([[3, 33, 35, 6]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, atol=1e-4, rtol=0)


def of_tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Scores that differ, whatever is sampled."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def stages(model: Path, folder: Path, lora: Any = None) -> dict[str, Callable[[], Any]]:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = {"data": {"path": str(rows)}, "model": str(model), "output": str(folder / "run"), "lora": lora, "epochs": 1}
    optim = {"learning_rate": 1e-4}

    def policy(**changes: Any) -> Callable[[], Any]:
        given = settings(model, folder / "run", {"steps": 1, "policy.lora": lora, "optim": optim} | changes)
        return lambda: train_policy(parse(TrainConfig, given), [of_tokens], PROMPTS)

    return {
        "sft": lambda: sft(parse(SftConfig, data | {"optim": optim})),
        "dpo": lambda: dpo(parse(DpoConfig, data | {"optim": optim})),
        "reward": lambda: reward(parse(RewardConfig, data | {"optim": optim})),
        "grpo": policy(**{"algorithm.name": "grpo", "rollout.group_size": 4}),
        "separate": policy(),
        "shared": policy(**{"critic.sharing": "shared"}),
    }


STAGES = ["sft", "dpo", "reward", "grpo", "separate", "shared"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_result_that_is_not_what_was_trained_is_refused(
    stage: str, tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = PreTrainedModel.save_pretrained

    def save_another(self: Any, *args: Any, **options: Any) -> Any:
        spoilt = not (stage in ("separate", "shared") and hasattr(self, "lm_head"))  # of these the critic
        kept = {name: weight.clone() for name, weight in self.state_dict().items()}
        if spoilt:
            disturbed(self)
        save(self, *args, **options)
        self.load_state_dict(kept)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_another)
    run = stages(tied, tmp_path)[stage]
    with pytest.raises(CheckpointError, match="differ from those of the trained one"):
        run()
    result = {"sft": "model", "reward": "model", "separate": "critic", "shared": "critic"}.get(stage, "policy")
    assert not (tmp_path / "run" / result).exists()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "lora", [None, {"r": 2, "alpha": 2}, {"r": 2, "alpha": 2, "target_modules": ["q_proj", "lm_head", "embed_tokens"]}]
)
def test_an_adapter_is_the_start_of_every_stage(stage: str, lora: Any, tied: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    if stage == "reward" and lora:
        lora = lora | {"target_modules": ["q_proj", "embed_tokens"]}
    model = disturbed(load_causal_lm(str(tied), lora=LoraSettings(r=2)))
    start = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    stages(tmp_path / "adapter", tmp_path, lora)[stage]()
    name = {"sft": "model", "reward": "model"}.get(stage, "policy")
    if stage == "reward":
        assert RewardModel.load(str(tmp_path / "run" / "model")).head.weight.any()
    else:
        moved = (logits(load_causal_lm(str(tmp_path / "run" / name))) - start).abs().max()
        assert 0 < moved < 0.3  # it began at the base with its adapter
    if stage != "reward" and lora:
        merged, alone = (logits(load_causal_lm(str(tmp_path / "run" / name / part))) for part in ("", "adapter"))
        torch.testing.assert_close(alone, merged, atol=1e-4, rtol=0)
    if stage in ("separate", "shared"):
        assert load_classifier(str(tmp_path / "run" / "critic")).score.weight.any()


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_a_reward_models_adapter_is_the_start_of_another_and_of_a_critic(
    lora: Any, tiny_policy: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    first = disturbed(RewardModel.load(str(tiny_policy), template="{prompt} {response}", lora=LoraSettings(r=2)).model)
    assert first is not None
    model = RewardModel(first, load_tokenizer(str(tiny_policy)), "{prompt} {response}")
    model.save(tmp_path / "first")
    adapter = tmp_path / "first" / "adapter"
    scores = model.score(PROMPTS, ["w1", "w2", "w3", "w4"])
    again = RewardModel.load(str(adapter), template="{prompt} {response}", lora=LoraSettings(**lora) if lora else None)
    torch.testing.assert_close(again.score(PROMPTS, ["w1", "w2", "w3", "w4"]), scores, atol=1e-5, rtol=0)
    assert any(weight.requires_grad for weight in again.model.parameters())
    stages(adapter, tmp_path, lora)["reward"]()
    changes = {"steps": 1, "critic.init": str(adapter), "policy.lora": lora}
    given = settings(tiny_policy, tmp_path / "ppo", changes)
    train_policy(parse(TrainConfig, given), [of_tokens], PROMPTS)
    assert load_classifier(str(tmp_path / "ppo" / "critic")).score.weight.any()
