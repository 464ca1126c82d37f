"""Packed rows give what padded rows give, states and gradients, for every kind of trunk; or padded rows are read.

The tolerance is that of the norms of transformers, which are computed in float32.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from keel import kernels
from keel.data.padding import pad_rows
from keel.models import prefixes
from keel.models.layers import recompute_layers
from keel.models.loading import load_causal_lm
from keel.models.packed import ATTENTION, pack_if_possible, token_states

from ..shapes import SIZES

GPT2_SIZES = {"vocab_size": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
NEOX = {name: value for name, value in SIZES.items() if name not in ("num_key_value_heads", "head_dim", "hidden_size")}
PACKED: dict[str, Any] = {
    "llama": lambda sizes: LlamaForCausalLM(LlamaConfig(**sizes)),
    "qwen3": lambda sizes: Qwen3ForCausalLM(Qwen3Config(**sizes)),
    "gpt2": lambda _: GPT2LMHeadModel(GPT2Config(**GPT2_SIZES)),
    "gpt-neox": lambda sizes: GPTNeoXForCausalLM(GPTNeoXConfig(**NEOX, hidden_size=4 * sizes["head_dim"])),
    "sliding window": lambda sizes: MistralForCausalLM(MistralConfig(**sizes, sliding_window=6)),
}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
PADDED: dict[str, Any] = {
    "window in the mask alone": lambda sizes: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**sizes, **EXPERTS, use_sliding_window=True, sliding_window=6, max_window_layers=2)
    ),
    "another one": lambda sizes: PhimoeForCausalLM(PhimoeConfig(**sizes, num_local_experts=2, sliding_window=6)),
    "sinks": lambda sizes: GptOssForCausalLM(GptOssConfig(**sizes, num_local_experts=2, num_experts_per_tok=1)),
    "position bias": lambda _: BloomForCausalLM(BloomConfig(vocab_size=16, hidden_size=16, n_layer=2, n_head=2)),
    "soft cap": lambda _: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, attn_logit_softcapping=0.05, attn_implementation="eager")
    ),
}


Rows = tuple[torch.Tensor, torch.Tensor]


def rows() -> Rows:
    """Padding on the left, the right, both sides and nowhere."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 16, (4, 12), generator=generator)
    mask = torch.tensor([[0] * 4 + [1] * 8, [1] * 9 + [0] * 3, [0] * 2 + [1] * 5 + [0] * 5, [1] * 12]).bool()
    return tokens, mask


def rows_of_a_prompt() -> Rows:
    """Two rows that are equal, the start of them, one that branches off within it, and one of another prompt."""
    text, branch, other = [3, 7, 7, 1, 12, 5, 9, 2], [3, 7, 7, 4, 12, 5], [7, 7, 1, 12]
    return pad_rows([text, branch, text[:5], other, text], 0, side="left")


@pytest.fixture(params=[rows, rows_of_a_prompt], ids=["distinct rows", "shared prefixes"])
def batch(request: pytest.FixtureRequest) -> Rows:
    given: Rows = request.param()
    return given


def model_of(kind: str, head_dim: int = 4) -> Any:
    torch.manual_seed(0)
    model = {**PACKED, **PADDED}[kind]({**SIZES, "head_dim": head_dim}).eval()
    if not hasattr(model.config, "num_experts_per_tok"):  # experts are multiplied in float32 or less
        model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def states_and_gradients(model: Any, batch: Rows) -> list[torch.Tensor]:
    model.zero_grad()
    states = token_states(model, *batch)
    (states**3).sum().backward()
    return [states.detach(), *(p.grad.clone() for p in model.base_model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", [*PACKED, *PADDED])
def test_the_states_are_those_of_each_row_alone(kind: str, batch: Rows) -> None:
    model = model_of(kind)
    pack_if_possible(model)
    assert (model.config._attn_implementation == ATTENTION) == (kind in PACKED)
    states = token_states(model, *batch)
    each = (row[real].unsqueeze(0) for row, real in zip(*batch, strict=True))
    alone = [model.base_model(input_ids=row).last_hidden_state[0] for row in each]
    torch.testing.assert_close(states, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", list(PACKED))
def test_the_gradients_are_those_of_padded_rows(kind: str, batch: Rows) -> None:
    model = model_of(kind)
    padded = states_and_gradients(model, batch)
    pack_if_possible(model)
    for ours, theirs in zip(states_and_gradients(model, batch), padded, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * max(1.0, float(theirs.abs().max())))


@pytest.mark.skipif(not kernels.available(), reason="there is no C compiler here")
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt-neox", "sliding window"])
def test_the_kernels_give_what_torch_gives(kind: str, batch: Rows, request: pytest.FixtureRequest) -> None:
    """In float32, which they take; heads of eight numbers."""
    model = model_of(kind, head_dim=8).float()
    pack_if_possible(model)
    with_kernels = states_and_gradients(model, batch)
    request.getfixturevalue("without_kernels")
    for ours, theirs in zip(with_kernels, states_and_gradients(model, batch), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_layers_that_are_computed_again(kind: str, batch: Rows) -> None:
    """Nothing changes but the memory: an intermediate result is no longer kept."""
    model = model_of(kind)
    pack_if_possible(model)
    whole, kept = states_and_gradients(model, batch), bytes_kept(model)
    recompute_layers(model.base_model)
    for ours, theirs in zip(states_and_gradients(model, batch), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert bytes_kept(model) < 0.5 * kept


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_shared_prefix_is_read_once(kind: str) -> None:
    model = model_of(kind)
    pack_if_possible(model)
    read = []
    model.base_model.get_input_embeddings().register_forward_pre_hook(lambda _, given: read.append(given[0].numel()))
    tokens, mask = rows_of_a_prompt()
    states = token_states(model, tokens, mask)
    assert (len(states), read) == (31, [15])  # 8 of the text, 3 of the branch, 4 of the other prompt


@pytest.mark.parametrize("kind", [kind for kind in PACKED if kind != "sliding window"])  # its norms are in float32
def test_a_shared_prefix_changes_no_gradient(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(kind)
    pack_if_possible(model)
    shared = states_and_gradients(model, rows_of_a_prompt())
    monkeypatch.setattr(prefixes, "WORTHWHILE", 0.0)
    for ours, theirs in zip(shared, states_and_gradients(model, rows_of_a_prompt()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def bytes_kept(model: Any) -> int:
    """What the graph of one forward pass holds for the gradient."""
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        token_states(model, *rows())
    return kept


def test_generate_goes_on_as_before(tiny_policy: Path) -> None:
    """The attention is sdpa wherever no rows are packed."""
    model = load_causal_lm(str(tiny_policy))
    tokens, mask = torch.tensor([[0, 4, 5], [4, 5, 6]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    ours = model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=4)
    model.set_attn_implementation("sdpa")
    assert torch.equal(ours, model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=4))
