"""16-bit weights learn through float32 masters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from keel.errors import ConfigError
from keel.learn.guard import Guard
from keel.learn.masters import load_trained_weights, trained_weights
from keel.learn.optim import build_optimizer
from keel.loop.checkpoints import TrainedState
from keel.run.checkpoint import latest_checkpoint, save_checkpoint
from keel.run.folder import RunFolder

from ..runs import train


def layer_of(dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    nn.init.normal_(layer.weight, std=0.02)
    return layer.to(torch.bfloat16).to(dtype)


def take_steps(layer: nn.Linear, rate: float, count: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return the optimizer, and what it trained before the steps."""
    optimizer = build_optimizer([(layer.parameters(), rate)])
    start = {name: weight.clone() for name, weight in trained_weights(optimizer, layer.named_parameters()).items()}
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        gradient = torch.randn(64, 64, generator=generator) + 1
        layer.weight.grad, layer.bias.grad = gradient.to(layer.weight.grad_dtype), gradient[0].clone()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return optimizer, start


def test_steps_far_below_the_rounding_of_a_weight_add_up() -> None:
    """The same as in float32, to its rounding. AdamW that moves bfloat16 weights leaves 98% of them where they are."""
    moves = []
    for layer in (layer_of(torch.bfloat16), layer_of(torch.float32)):
        optimizer, start = take_steps(layer, 1e-6, 30)
        learned = trained_weights(optimizer, layer.named_parameters())
        assert all(weight.dtype == torch.float32 for weight in learned.values())
        assert all(torch.equal(layer.get_parameter(n), w.to(layer.weight.dtype)) for n, w in learned.items())
        moves.append({name: weight - start[name] for name, weight in learned.items()})
    for name, move in moves[0].items():
        torch.testing.assert_close(move, moves[1][name], rtol=0, atol=1e-7)
        assert bool((move != 0).all())


def test_rounded_weights_move_from_the_first_step() -> None:
    """On average by as much as in float32, although the step is a hundredth of the distance between their values."""
    moves = []
    for dtype in (torch.bfloat16, torch.float32):
        layer, start = layer_of(dtype), layer_of(dtype)
        take_steps(layer, 1e-6, 1)
        moves.append((layer.weight - start.weight).float().mean().item())
    assert moves[0] == pytest.approx(moves[1], rel=0.2)
    assert moves[1] == pytest.approx(-0.9e-6, rel=0.3)


def test_micro_batches_add_up_in_float32() -> None:
    """In bfloat16 the sum of 256 and 256 ones would stay 256."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = build_optimizer([([weight], 1.0)])
    for factor in (256.0, *[1.0] * 256):
        (weight * factor).sum().backward()
    assert weight.grad is not None
    assert weight.grad.item() == 512.0
    optimizer.zero_grad()
    assert weight.grad is None


def test_a_weight_without_a_gradient_stays() -> None:
    layer = layer_of(torch.bfloat16)
    optimizer = build_optimizer([(layer.parameters(), 0.1)])
    layer.weight.grad = torch.ones(64, 64)
    bias = layer.bias.detach().clone()
    optimizer.step()
    assert torch.equal(layer.bias, bias)


def test_loaded_weights_reach_the_model() -> None:
    layer = layer_of(torch.bfloat16)
    optimizer = build_optimizer([(layer.parameters(), 0.1)])
    saved = {"weight": torch.full((64, 64), 0.1), "bias": torch.full((64,), 0.3)}
    load_trained_weights(optimizer, layer.named_parameters(), lambda name, weight: weight.copy_(saved[name]))
    assert torch.equal(layer.weight, saved["weight"].to(torch.bfloat16))
    assert torch.equal(trained_weights(optimizer, layer.named_parameters())["bias"], saved["bias"])


@pytest.mark.parametrize("sharing", ["separate", "shared"])
def test_a_run_in_bfloat16_keeps_float32_and_saves_its_rounding(
    tiny_policy: Path, tmp_path: Path, sharing: str
) -> None:
    changes = {"policy.dtype": "bfloat16", "critic.sharing": sharing, "optim.learning_rate": 1e-6}
    train(tiny_policy, tmp_path / "run", {**changes, "steps": 2})
    weights = load_file(max((tmp_path / "run" / "checkpoints").glob("step-*")) / "weights.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    result = load_file(tmp_path / "run" / "policy" / "model.safetensors")
    start = load_file(tiny_policy / "model.safetensors")
    moved = 0
    for name, weight in result.items():
        master = weights[f"policy.{name}"]
        assert torch.equal(weight, master.to(torch.bfloat16))
        moved += int((master != start[name].to(torch.bfloat16).float()).sum())
    assert moved > 0.9 * sum(weight.numel() for weight in result.values())


def test_checkpoints_of_16_bit_weights_are_refused(tmp_path: Path) -> None:
    """Those that keel wrote before it had masters."""
    layer, folder = layer_of(torch.bfloat16), RunFolder(tmp_path)
    save_checkpoint(folder, 1, {"guard": Guard().counters()}, {"weights": dict(layer.named_parameters())}, {}, 1)
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    state = TrainedState(layer, build_optimizer([(layer.parameters(), 0.1)]), Guard())
    with pytest.raises(ConfigError, match="16-bit weights") as caught:
        state.restore(checkpoint)
    assert caught.value.where == str(checkpoint.path)
