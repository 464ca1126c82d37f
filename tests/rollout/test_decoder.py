"""All decoders give the states of each row read alone, whatever ended beside it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from keel import kernels
from keel.data.prompts import Prompt
from keel.rollout.decoding import layer_decoder
from keel.rollout.decoding.decoder import Decoder, choose_decoder, fits_kernels
from keel.rollout.decoding.kernel_decoder import KernelDecoder
from keel.rollout.decoding.layer_decoder import GraphDecoder, LayerDecoder
from keel.rollout.decoding.module_decoder import FullDecoder, ModuleDecoder
from keel.rollout.sampler import count_copies, remaining_rows

from ..shapes import SIZES

MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES | {"head_dim": 8}, attention_bias=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES | {"head_dim": 8})),
    "heads of 4": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=16, n_layer=2, n_head=2, n_positions=32)),
}
PROMPTS = torch.tensor([[0, 0, 3], [4, 5, 6], [0, 7, 8]])
MASK = torch.tensor([[0, 0, 1], [1, 1, 1], [0, 1, 1]]).bool()


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def decoders(model: Any) -> list[Decoder]:
    if isinstance(model, GPT2LMHeadModel):
        return [ModuleDecoder(model)]
    fit = [KernelDecoder(model.model, 6)] if fits_kernels(model.model) else []
    return [ModuleDecoder(model), LayerDecoder(model.model, 6), GraphDecoder(model.model, 6), *fit]


def alone(model: Any, tokens: list[int]) -> Tensor:
    states: Tensor = model.base_model(input_ids=torch.tensor([tokens])).last_hidden_state[0, -1]
    return states


@torch.no_grad()
def largest_gap(model: Any) -> float:
    """Between the decoders' states and those of full passes, over rows that grow and end."""
    gaps = []
    for decoder in decoders(model):
        rows = [[3], [3], [4, 5, 6], [4, 5, 6], [7, 8], [7, 8]]
        states = decoder.start(PROMPTS, MASK, copies=2)
        for chosen, kept in (([1, 2, 3, 4, 5, 6], [0, 5, 2, 3]), ([7, 8, 9, 10], [2, 1]), ([11, 12], [0, 1])):
            gaps.append((states - torch.stack([alone(model, row) for row in rows])).abs().max().item())
            rows = [[*rows[row], token] for row, token in zip(range(len(rows)), chosen, strict=True)]
            decoder.keep(torch.tensor(kept))
            states = decoder.advance(torch.tensor(chosen)[kept])
            rows = [rows[row] for row in kept]
        gaps.append((states - torch.stack([alone(model, row) for row in rows])).abs().max().item())
    return max(gaps)


def test_rows_that_grow_and_end(model: Any) -> None:
    assert largest_gap(model) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen3", "adapter"])
def test_in_bfloat16_the_kernels_are_closer_to_exact_states(kind: str) -> None:
    """Exact: the same weights in float32. The kernels round only the inputs of linear maps, not their results too."""
    torch.manual_seed(0)
    model = MODELS["llama" if kind == "adapter" else kind]().eval().to(torch.bfloat16)
    exact = copy.deepcopy(model).float()
    if kind == "adapter":  # a linear map that works through its module only
        model.model.layers[1].mlp.up_proj.register_forward_hook(lambda _, inputs, output: output)
    gaps = []
    for kind_of_decoder in (KernelDecoder, LayerDecoder):
        decoder = kind_of_decoder(model.model, 6)
        states = [decoder.start(PROMPTS, MASK, copies=2), decoder.advance(torch.tensor([1, 2, 3, 4, 5, 6]))]
        rows = [[3], [3], [4, 5, 6], [4, 5, 6], [7, 8], [7, 8]]
        longer = [[*row, token] for token, row in enumerate(rows, 1)]
        expected = torch.stack([torch.stack([alone(exact, row) for row in group]) for group in (rows, longer)])
        gaps.append((torch.stack(states) - expected).abs().mean().item())
    assert gaps[0] < 0.75 * gaps[1] < 0.05


class Recording(TorchDispatchMode):
    """What a GPU's graph is, on any device: a step's operations on the memory that they met when recorded, without the
    Python around them."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, found))
        return found

    def play(self) -> None:
        for operation, args, kwargs, memory in self.operations:
            again = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(memory), tree_leaves(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def recorded(step: Callable[[], Tensor]) -> tuple[Recording, Tensor]:
    """Unlike a graph's, this recording runs the step, so what it changed is put back."""
    decoder = step.func.__self__  # type: ignore[attr-defined]
    changed = decoder.cache, decoder.bias, decoder.positions, decoder.here
    before = [tensor.clone() for tensor in changed]
    with Recording() as recording:
        found = step()
    for tensor, old in zip(changed, before, strict=True):
        tensor.copy_(old)
    return recording, found


@torch.no_grad()
@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("kind", ["llama", "heads of 4"])
def test_recorded_steps(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Played back, at every number of rows and columns that occurs, they give what the steps themselves give."""
    torch.manual_seed(0)
    trunk = MODELS[kind]().eval().model
    decoders = LayerDecoder(trunk, 40), GraphDecoder(trunk, 40)
    played = []

    def record(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        recording, found = recorded(step)

        def play() -> Tensor:
            recording.play()
            played.append(recording)
            return found

        return play

    monkeypatch.setattr(layer_decoder, "record_graph", record)
    monkeypatch.setattr(GraphDecoder, "WIDTH", 8)
    states = [decoder.start(PROMPTS, MASK, copies=4) for decoder in decoders]
    for step in range(40):
        torch.testing.assert_close(states[1], states[0], rtol=0, atol=1e-6)
        tokens = torch.randint(16, (len(states[0]),))
        if step % 4 == 3 and len(tokens) > 1:
            rows = torch.arange(len(tokens) - 1)
            rows[step % len(rows)] = len(tokens) - 1
            tokens = tokens[rows]
            for decoder in decoders:
                decoder.keep(rows)
        states = [decoder.advance(tokens) for decoder in decoders]
    assert len(played) > 25
    assert len(set(played)) == len(decoders[1].steps) < 12


def test_prompts_longer_than_the_kernels_take(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keel.models.attention.MIDDLING", 2)
    assert largest_gap(model) < 1e-5


@pytest.mark.skipif(not kernels.available(), reason="there is no C compiler here")
@pytest.mark.parametrize(
    ("kind", "decoder"), [("llama", KernelDecoder), ("heads of 4", LayerDecoder), ("gpt2", ModuleDecoder)]
)
def test_which_decoder(kind: str, decoder: type) -> None:
    assert isinstance(choose_decoder(MODELS[kind]().eval(), 4), decoder)


@pytest.mark.usefixtures("without_kernels")
def test_which_decoder_without_a_compiler() -> None:
    assert isinstance(choose_decoder(MODELS["llama"](), 4), LayerDecoder)


HYBRID = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4}
STATES = {"vocab_size": 16, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
OTHERS: dict[str, Any] = {
    "hybrid": lambda: Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **SIZES, **HYBRID, layer_types=["linear_attention", "full_attention"], num_experts=2, num_experts_per_tok=1
        )
    ),
    "state space": lambda: MambaForCausalLM(MambaConfig(**STATES)),
    "no cache of that kind": lambda: RwkvForCausalLM(RwkvConfig(vocab_size=16, hidden_size=16, num_hidden_layers=2)),
}


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "decoder"),
    [("hybrid", ModuleDecoder), ("state space", ModuleDecoder), ("no cache of that kind", FullDecoder)],
)
def test_rows_of_other_caches_are_repeated_and_end(kind: str, decoder: type) -> None:
    torch.manual_seed(0)
    model = OTHERS[kind]().eval()
    made = choose_decoder(model, 6)
    assert isinstance(made, decoder)
    rows = [[3], [3], [4, 5, 6], [4, 5, 6], [7, 8], [7, 8]]
    made.start(PROMPTS, MASK, copies=2)
    for chosen, kept in (([1, 2, 3, 4, 5, 6], [0, 5, 2, 3]), ([7, 8, 9, 10], [2, 1])):
        rows = [[*row, token] for row, token in zip(rows, chosen, strict=True)]
        states = made.advance(torch.tensor(chosen))
        torch.testing.assert_close(states, torch.stack([alone(model, row) for row in rows]), rtol=1e-4, atol=1e-4)
        rows = [rows[row] for row in kept]
        made.keep(torch.tensor(kept))


@torch.no_grad()
def test_light_layers_call_what_is_hooked() -> None:
    """A linear map with a hook, or of another kind, is called as it is."""
    trunk = MODELS["llama"]().model
    calls = []
    trunk.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append("hook"))
    trunk.layers[1].mlp.up_proj = torch.nn.Sequential(trunk.layers[1].mlp.up_proj)
    LayerDecoder(trunk, 2).start(PROMPTS, MASK, copies=1)
    assert calls == ["hook"]


@torch.no_grad()
def test_in_bfloat16_the_states_of_a_row_do_not_depend_on_the_other_rows() -> None:
    """Else a run on several processes, whose batches are smaller, would sample other responses.

    The order of sums may differ, and now and then changes what a number is rounded to.
    """
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval().to(torch.bfloat16)
    if not fits_kernels(model.model):
        pytest.skip("needs the compiled kernels")
    prompts = torch.randint(3, 16, (24, 6))
    few, many = KernelDecoder(model.model, 2), KernelDecoder(model.model, 2)
    states = few.start(prompts[:4], torch.ones(4, 6, dtype=torch.bool), copies=1)
    with_others = many.start(prompts, torch.ones(24, 6, dtype=torch.bool), copies=1)[:4]
    torch.testing.assert_close(states, with_others, rtol=0, atol=5e-4)
    chosen = torch.randint(3, 16, (24,))
    torch.testing.assert_close(few.advance(chosen[:4]), many.advance(chosen)[:4], rtol=0, atol=5e-4)


def a_forward_of_its_own(layer: Any) -> None:
    project = layer.self_attn.q_proj
    forward = project.forward
    project.forward = lambda x: 2.0 * forward(x)  # as accelerate's hooks do


def another_epsilon(layer: Any) -> None:
    layer.input_layernorm.variance_epsilon = 0.5


def more_units(layer: Any) -> None:
    wide = layer.mlp
    size = 4 * wide.gate_proj.out_features
    wide.gate_proj, wide.up_proj = (torch.nn.Linear(wide.gate_proj.in_features, size, bias=False) for _ in range(2))
    wide.down_proj = torch.nn.Linear(size, wide.down_proj.out_features, bias=False)


@pytest.mark.parametrize("change", [a_forward_of_its_own, another_epsilon, more_units])
@torch.no_grad()
def test_layers_that_differ_from_each_other(change: Callable[[Any], None]) -> None:
    torch.manual_seed(0)
    model = MODELS["llama"]().eval()
    change(model.model.layers[1])
    for made in decoders(model):
        made.start(PROMPTS, MASK, copies=1)
        states = made.advance(torch.tensor([2, 3, 4]))
        rows = [[*row[mask].tolist(), token] for row, mask, token in zip(PROMPTS, MASK, (2, 3, 4), strict=True)]
        torch.testing.assert_close(states, torch.stack([alone(model, row) for row in rows]), rtol=1e-4, atol=1e-4)


def test_the_places_of_rows_that_ended_are_filled_from_the_back() -> None:
    ended = torch.tensor([False, True, False, True, False, False])
    assert remaining_rows(ended).tolist() == [0, 4, 2, 5]
    assert remaining_rows(torch.tensor([True, True])).tolist() == []
    assert remaining_rows(torch.tensor([False, False])).tolist() == [0, 1]


def test_how_often_a_prompt_is_repeated() -> None:
    one, two = (Prompt(text, text, (1, 2), {}) for text in "ab")
    assert count_copies([one, one, two, two]) == 2
    assert count_copies([one, two, one, two]) == 1
    assert count_copies([one, one, two]) == 1
    assert count_copies([one] * 5) == 5


def test_a_model_without_layers() -> None:
    decoder = choose_decoder(LlamaForCausalLM(LlamaConfig(**SIZES | {"num_hidden_layers": 0})).eval(), 2)
    assert decoder.start(PROMPTS, MASK, copies=2).shape == (6, SIZES["hidden_size"])
