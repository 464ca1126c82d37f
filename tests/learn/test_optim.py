"""One optimizer step: who decays, how the rate falls, how gradients are clipped."""

from itertools import pairwise

import pytest
import torch
from torch.nn import Linear, Parameter

from keel.learn.optim import build_optimizer, clip_gradients, gradient_norm, learning_rate_factor, set_learning_rate


def parameter(*values: float) -> Parameter:
    return Parameter(torch.tensor(values, dtype=torch.float64))


def test_matrices_decay_and_vectors_do_not():
    layer = Linear(2, 2)
    before = [p.detach().clone() for p in (layer.weight, layer.bias)]
    optimizer = build_optimizer([(layer.parameters(), 0.1)], weight_decay=0.5)
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(layer.weight, before[0] * 0.95)
    assert torch.equal(layer.bias, before[1])


def test_tied_and_frozen_parameters():
    shared, own, frozen = parameter(1.0), parameter(2.0), parameter(3.0)
    frozen.requires_grad_(False)
    optimizer = build_optimizer([([shared, shared, frozen], 0.1), ([shared, own], 0.2)])
    groups = [(group["params"], group["lr"]) for group in optimizer.param_groups]
    assert [([id(p) for p in params], lr) for params, lr in groups] == [([id(shared)], 0.1), ([id(own)], 0.2)]


def test_epsilon_is_added_to_the_corrected_root():
    """Torch's form: with g = 1e-5 and eps = 1e-5 the first step is half the rate, not 0.03 of it."""
    weight = parameter(0.0)
    optimizer = build_optimizer([([weight], 1.0)], eps=1e-5)
    weight.grad = torch.tensor([1e-5], dtype=torch.float64)
    optimizer.step()
    assert weight.item() == pytest.approx(-0.5, abs=1e-6)


def test_the_linear_rate_ends_one_step_above_zero():
    factors = [learning_rate_factor("linear", i, 4) for i in range(4)]
    assert factors == [1.0, 0.75, 0.5, 0.25]


def test_the_cosine_and_the_constant_rate():
    assert [learning_rate_factor("cosine", i, 4) for i in range(4)] == pytest.approx([1, 0.8535534, 0.5, 0.1464466])
    assert [learning_rate_factor("constant", i, 4) for i in range(4)] == [1.0] * 4
    with pytest.raises(ValueError, match="unknown schedule"):
        learning_rate_factor("square", 0, 4)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_rate_rises_first(schedule: str):
    factors = [learning_rate_factor(schedule, i, 10, warmup_steps=3) for i in range(10)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(a >= b > 0 for a, b in pairwise(factors[3:]))


def test_every_group_keeps_its_own_peak():
    optimizer = build_optimizer([([parameter(1.0)], 0.1), ([parameter(2.0)], 0.4)])
    set_learning_rate(optimizer, 0.5)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.1]


def test_gradients_are_clipped_to_a_joint_norm():
    a, b = parameter(0.0), parameter(0.0, 0.0)
    a.grad, b.grad = torch.tensor([3.0]).double(), torch.tensor([0.0, 4.0]).double()
    norm = gradient_norm([a, b])
    assert norm.item() == pytest.approx(5.0)
    clip_gradients([a, b], 1.0, norm)
    assert [*a.grad.tolist(), *b.grad.tolist()] == pytest.approx([0.6, 0.0, 0.8], rel=1e-5)
    norm = gradient_norm([a, b])
    assert norm.item() == pytest.approx(1.0, rel=1e-5)
    clip_gradients([a, b], 2.0, norm)
    assert a.grad.item() == pytest.approx(0.6, rel=1e-5)
