"""How a model is read is found by trials that rounding, long windows and odd families do not mislead."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    DogeConfig,
    DogeForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ReformerConfig,
    ReformerModelWithLMHead,
)

from keel.errors import ConfigError
from keel.models.adapters import require_targets, with_lora
from keel.models.heads import next_token_logits, trunk
from keel.models.packed import attention, pack_if_possible, reads_packed_rows, reads_single_rows, token_states
from keel.models.positions import require_positions
from keel.models.trial import WINDOW, trial

from ..shapes import SIZES

BERT = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA_4 = {"intermediate_size_mlp": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 4}
SHORT, LONG = [1.0, 1.0], [4.0, 4.0]


class Capped(LlamaForCausalLM):
    """With a soft cap that no setting names."""

    def forward(self, *given: Any, **named: Any) -> Any:
        output = super().forward(*given, **named)
        output.logits = 3 * torch.tanh(output.logits / 3)
        return output


def ready(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.get_input_embeddings().padding_idx = None
    return model.eval()


@pytest.fixture
def llama() -> Any:
    torch.manual_seed(0)
    return ready(LlamaForCausalLM(LlamaConfig(**SIZES)))


def rows(longest: int = 12) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 16, (3, longest), generator=torch.Generator().manual_seed(0))
    return tokens, torch.arange(longest) < torch.tensor([[longest], [5], [9]])


def alone(model: Any, longest: int = 12) -> Tensor:
    each = (row[real].unsqueeze(0) for row, real in zip(*rows(longest), strict=True))
    return torch.cat([trunk(model)(input_ids=row).last_hidden_state[0] for row in each])


@pytest.mark.parametrize(("name", "value"), [("softcap", 5.0), ("s_aux", torch.ones(4)), ("is_causal", False)])
@pytest.mark.parametrize("packs", [True, False])
def test_an_argument_that_is_not_known_is_refused(name: str, value: Any, packs: bool) -> None:
    x = torch.ones(1, 2, 3, 4)
    layout = {"layout": object()} if packs else {}
    with pytest.raises(TypeError, match="attention with"):
        attention(nn.Module(), x, x, x, None, **{name: value}, **layout)


def test_a_trial_is_exact_and_leaves_nothing_behind() -> None:
    model = ready(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=9)).to(torch.bfloat16))
    places = [parameter.data_ptr() for parameter in model.parameters()]
    with trial(model):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert model.config.sliding_window == WINDOW
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.sliding_window == 9


def test_a_small_difference_in_bfloat16_is_seen(llama: Any) -> None:
    """Less than rounding in that type, as a window or a cap may be over few tokens."""
    llama.to(torch.bfloat16)
    projection = llama.model.layers[1].self_attn.o_proj
    projection.register_forward_hook(lambda _, __, out: out * (1.01 if out.shape[1] > 12 else 1.0))
    llama.model.forward = with_layers_called(llama.model)
    pack_if_possible(llama)
    assert not reads_packed_rows(llama)


def with_layers_called(model: Any) -> Any:
    """Its forward pass, under another class name, so that keel does not walk through its layers itself."""
    model.__class__ = type("AnotherModel", (type(model),), {})
    return model.forward


@torch.no_grad()
def test_rows_that_depend_on_their_batch_are_read_one_by_one(llama: Any) -> None:
    def mixed(_: Any, __: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean((0, 1))
        return output

    llama.model.register_forward_hook(mixed)
    pack_if_possible_without_causality(llama)
    assert reads_single_rows(llama)
    torch.testing.assert_close(token_states(llama, *rows()), alone(llama), rtol=1e-5, atol=1e-5)


def pack_if_possible_without_causality(model: Any) -> None:
    """As for a classifier, whose tokens may see later ones."""
    head, model.get_output_embeddings = model.get_output_embeddings, lambda: None
    pack_if_possible(model)
    model.get_output_embeddings = head


def test_one_trial_serves_all_models_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy, its critic and a reward model: the same layers under other heads and other weights."""
    tried: list[str] = []

    def recorded(model: Any) -> Any:
        tried.append(type(model).__name__)
        return trial(model)

    monkeypatch.setattr("keel.models.packed.trial", recorded)

    def made(kind: Any, size: int = 20) -> Any:  # no other test has layers of this size
        return ready(kind(LlamaConfig(**SIZES | {"intermediate_size": size})))

    for kind in (LlamaForCausalLM, LlamaForSequenceClassification, LlamaForCausalLM, Capped):
        pack_if_possible(model := made(kind))
        assert reads_packed_rows(model)
        assert not reads_single_rows(model)
    assert tried == ["LlamaForCausalLM", "Capped"]
    pack_if_possible(made(LlamaForCausalLM, size=24))
    assert tried == ["LlamaForCausalLM", "Capped", "LlamaForCausalLM"]


def test_what_is_not_causal_is_refused_by_name() -> None:
    with pytest.raises(
        ConfigError, match="BertLMHeadModel is not a causal language model: tokens attend to later ones"
    ):
        pack_if_possible(ready(BertLMHeadModel(BertConfig(**BERT))))


def test_what_reads_more_than_tokens_is_refused_by_name(llama: Any) -> None:
    def hungry(*_: Any) -> None:
        raise ValueError("give pictures")

    llama.model.register_forward_pre_hook(hungry)
    with pytest.raises(ConfigError, match="LlamaForCausalLM needs other inputs than tokens: give pictures"):
        pack_if_possible(llama)


def test_what_is_never_twice_the_same_is_refused_by_name(llama: Any) -> None:
    llama.model.layers[0].mlp.register_forward_hook(lambda _, __, out: out + torch.randn_like(out))
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM is not a causal .* the second time"):
        pack_if_possible(llama)


def test_a_window_of_keys_is_left_within_a_trial_unless_it_has_all_positions() -> None:
    """Doge chooses that many keys once a row has more; which of equal ones depends on later tokens."""

    def with_equal_keys(window: int) -> Any:
        torch.manual_seed(0)
        model = ready(DogeForCausalLM(DogeConfig(**SIZES, keep_window_size=window)))
        for layer in model.model.layers:
            nn.init.zeros_(layer.self_attn.A)
        return model

    pack_if_possible(with_equal_keys(SIZES["max_position_embeddings"]))
    with pytest.raises(ConfigError, match="tokens attend to later ones"):
        pack_if_possible(with_equal_keys(SIZES["max_position_embeddings"] - 1))


def test_random_hashes_show_within_a_trial() -> None:
    """Reformer draws them for rows that have more tokens than a chunk."""
    sizes = {"vocab_size": 48, "hidden_size": 16, "num_attention_heads": 2, "attention_head_size": 8}
    layers = {"attn_layers": ["lsh", "lsh"], "num_hidden_layers": 2, "axial_pos_embds": False}
    config = ReformerConfig(**sizes, **layers, is_decoder=True, lsh_attn_chunk_length=64)
    with pytest.raises(ConfigError, match="the second time"):
        pack_if_possible(ready(ReformerModelWithLMHead(config)))


@torch.no_grad()
@pytest.mark.parametrize(
    "made",
    [
        lambda: BertLMHeadModel(BertConfig(**BERT, is_decoder=True)),
        lambda: Capped(LlamaConfig(**SIZES)),
        lambda: Llama4ForCausalLM(Llama4TextConfig(**{**SIZES, **LLAMA_4})),
    ],
    ids=["a layer before the matrix", "a cap of another name", "no trunk under its prefix"],
)
def test_logits_are_the_models(made: Any) -> None:
    torch.manual_seed(0)
    model = ready(made())
    pack_if_possible(model)
    tokens = rows()[0]
    states = token_states(model, tokens, torch.ones_like(tokens, dtype=torch.bool)).view(3, 12, -1)
    torch.testing.assert_close(next_token_logits(model, states), model(tokens).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_longrope_reads_each_row_by_its_own_length() -> None:
    rope = {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 14}
    rope |= {"short_factor": SHORT, "long_factor": LONG, "rope_theta": 10000.0}
    model = ready(LlamaForCausalLM(LlamaConfig(**SIZES | {"max_position_embeddings": 32}, rope_parameters=rope)))
    pack_if_possible(model)
    torch.testing.assert_close(token_states(model, *rows(20)), alone(model, 20), rtol=1e-5, atol=1e-5)
    require_positions(model, 10, 4, "m", "sampling")
    with pytest.raises(
        ConfigError, match=r"m: the longest prompt and response have 15 tokens, .*LongRoPE.* above 14 tokens"
    ):
        require_positions(model, 11, 4, "m", "sampling")


class Rank:
    r, alpha, target_modules = 2, 4, "all-linear"


def test_adapters_leave_out_what_returns_something_else() -> None:
    model = with_lora(ready(Llama4ForCausalLM(Llama4TextConfig(**{**SIZES, **LLAMA_4}))), Rank(), "CAUSAL_LM")
    assert model(rows()[0]).logits.isfinite().all()
    adapted = [name for name, _ in model.named_modules() if name.endswith("lora_A")]
    assert adapted
    assert not any("router" in name for name in adapted)


def test_adapters_take_layers_of_their_own_class_that_return_what_a_linear_layer_returns() -> None:
    shape = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = with_lora(ready(FalconForCausalLM(FalconConfig(**shape))), Rank(), "CAUSAL_LM")
    assert any(name.endswith("query_key_value.lora_A") for name, _ in model.named_modules())


def test_adapters_leave_out_layers_that_share_their_weights() -> None:
    """Each would have the adapters of all, once they are merged."""
    torch.manual_seed(0)
    model = ready(LlamaForCausalLM(LlamaConfig(**SIZES)))
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    shared = with_lora(model, Rank(), "CAUSAL_LM")
    adapted = [name for name, _ in shared.named_modules() if name.endswith("lora_A")]
    assert any("gate_proj" in name for name in adapted)
    assert not any("up_proj" in name for name in adapted)


def test_named_layers_that_share_their_weights_are_refused() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    named = Rank()
    named.target_modules = ["up_proj"]  # type: ignore[assignment]
    with pytest.raises(ConfigError) as error:
        require_targets(model, named)
    assert error.value.where == "lora.target_modules"


def test_adapters_of_state_space_models_leave_out_what_peft_refuses() -> None:
    shape = {"vocab_size": 16, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
    model = with_lora(ready(MambaForCausalLM(MambaConfig(**shape))), Rank(), "CAUSAL_LM")
    assert any(name.endswith("in_proj.lora_A") for name, _ in model.named_modules())
