"""How many tokens a model's positions serve."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

from keel.errors import ConfigError
from keel.models.positions import num_positions, require_positions
from keel.models.trial import trial

from ..shapes import SIZES


def test_a_model_that_numbers_its_tokens_from_the_pad_token_on_has_fewer_positions() -> None:
    """RoBERTa's 32 rows of positions, with pad token 1, serve 30 tokens, as a policy too."""
    sizes = {name: size for name, size in SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
    model = RobertaForCausalLM(RobertaConfig(**sizes, pad_token_id=1, is_decoder=True)).eval()
    count = num_positions(model)
    assert count == SIZES["max_position_embeddings"] - 2
    assert model(torch.full((1, count), 5)).logits.shape[1] == count
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, count + 1), 5))
    require_positions(model, count - 1, 1, "policy", "rollout")
    with pytest.raises(ConfigError):
        require_positions(model, count, 1, "policy", "rollout")


def test_a_model_without_a_limit_has_none() -> None:
    """XLNet's config gives -1 positions."""
    model = XLNetLMHeadModel(XLNetConfig(vocab_size=16, d_model=16, n_layer=1, n_head=2, d_inner=16))
    assert num_positions(model) is None
    with trial(model) as (tokens, mask):
        assert tokens.shape == mask.shape
        assert mask[0].all()


def test_other_models_have_as_many_positions_as_their_config_says() -> None:
    assert num_positions(LlamaForCausalLM(LlamaConfig(**SIZES))) == SIZES["max_position_embeddings"]
