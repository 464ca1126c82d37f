"""A model that has no gradients the way keel trains is refused before anything starts, and may still be evaluated."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from transformers import ReformerConfig, xLSTMConfig

from keel.config import DpoConfig, EvaluateConfig, RewardConfig, SftConfig, TrainConfig, parse
from keel.errors import ConfigError
from keel.evaluation.evaluate import evaluate_policies
from keel.models.gradients import require_gradients
from keel.models.loading import load_causal_lm
from keel.supervised.dpo import dpo
from keel.supervised.reward import reward
from keel.supervised.sft import sft
from keel.training.policy import train_policy

from ..conftest import save_tiny_model
from ..runs import PROMPTS, settings, share_of_w3

LORA = {"r": 2, "target_modules": "all-linear"}
ROWS = [{"prompt": text, "completion": " w2 w3", "chosen": " w2 w3", "rejected": " w4"} for text in PROMPTS]


@pytest.fixture(scope="module")
def reformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its layers are reversible, and their gradient raises in evaluation mode."""
    config = ReformerConfig(
        vocab_size=32,
        hidden_size=16,
        attention_head_size=8,
        num_attention_heads=2,
        feed_forward_size=24,
        max_position_embeddings=256,
        attn_layers=["local", "local"],
        num_hidden_layers=2,
        axial_pos_embds=False,
        is_decoder=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return save_tiny_model(config, "<pad>", tmp_path_factory.mktemp("reformer"))


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "adapter"])
@pytest.mark.parametrize(("run", "kind"), [(sft, SftConfig), (reward, RewardConfig), (dpo, DpoConfig)])
def test_supervised_verbs_refuse_it(run: Any, kind: Any, lora: Any, reformer: Path, data: str, tmp_path: Path) -> None:
    given = {"model": str(reformer), "data": {"path": data}, "output": str(tmp_path / "run"), "lora": lora}
    with pytest.raises(ConfigError) as error:
        run(parse(kind, given))
    assert error.value.where == str(reformer)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "adapter"])
def test_policy_learning_refuses_it(lora: Any, reformer: Path, tmp_path: Path) -> None:
    changes = {"algorithm.name": "reinforce", "policy.lora": lora}
    given = settings(reformer, tmp_path / "run", changes)
    with pytest.raises(ConfigError) as error:
        train_policy(parse(TrainConfig, given), [share_of_w3], PROMPTS)
    assert error.value.where == str(reformer)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_type_that_fails_in_long_rows_is_refused(dtype: str, tmp_path: Path) -> None:
    """transformers multiplies xLSTM's float32 states by bfloat16 values in rows of several chunks."""
    config = xLSTMConfig(vocab_size=32, embedding_dim=16, hidden_size=16, num_blocks=1, num_heads=2, chunk_size=64)
    model = load_causal_lm(str(save_tiny_model(config, "<pad>", tmp_path)), dtype)
    with nullcontext() if dtype == "float32" else pytest.raises(ConfigError):
        require_gradients(model, "m")


def test_it_may_be_evaluated(reformer: Path, data: str) -> None:
    sampling = {"max_response_tokens": 3, "num_responses": 1}
    given = {"policy": str(reformer), "prompts": {"path": data}, "sampling": sampling}
    assert 0 <= evaluate_policies(parse(EvaluateConfig, given), [share_of_w3])["policy"]["score"] <= 1


def test_the_trial_leaves_no_gradient(tiny_policy: Path) -> None:
    model = load_causal_lm(str(tiny_policy))
    require_gradients(model, "m")
    assert all(weight.grad is None for weight in model.parameters())
