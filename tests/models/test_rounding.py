"""Float32 values that round to given 16-bit weights."""

import torch

from keel.models.rounding import widen


def every_bfloat16_number() -> torch.Tensor:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def test_every_number_rounds_back() -> None:
    weight = every_bfloat16_number()
    rounded = widen(weight).to(torch.bfloat16)
    assert torch.equal(rounded.isnan(), weight.isnan())
    numbers = ~weight.isnan()
    assert torch.equal(rounded[numbers].view(torch.int16), weight[numbers].view(torch.int16))


def test_values_are_moved_except_zeros_and_what_is_not_finite() -> None:
    weight = every_bfloat16_number()
    moved = widen(weight).view(torch.int32) != weight.float().view(torch.int32)
    fixed = (weight == 0) | ~weight.isfinite()
    assert not moved[fixed].any()
    assert moved[~fixed].float().mean() > 0.999


def test_a_small_step_moves_as_large_a_share_of_the_rounded_weights() -> None:
    """Weights between 1 and 2 are 1/128 apart: a step of 1% of that takes 1% of them to the next number."""
    torch.manual_seed(0)
    weight = (1 + torch.rand(1_000_000)).clamp(1.01, 1.99).to(torch.bfloat16)
    for share in (0.01, -0.01, 0.3):
        change = ((widen(weight) + share / 128).to(torch.bfloat16).float() - weight.float()) * 128
        assert abs(change.mean() - share) < 0.002  # four standard errors at a share of 0.3
        assert set(change.unique().tolist()) == {0.0, 1.0 if share > 0 else -1.0}


def test_the_same_weight_gives_the_same_values() -> None:
    weight = torch.randn(100, 10, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    first = widen(weight)
    torch.rand(1)
    assert torch.equal(first, widen(weight.clone()))


def test_other_formats_are_only_converted() -> None:
    weight = torch.tensor([0.5, 1.5], dtype=torch.float16)
    assert torch.equal(widen(weight), torch.tensor([0.5, 1.5]))
