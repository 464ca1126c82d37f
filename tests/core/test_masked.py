"""Statistics over counted entries."""

import pytest
import torch

from keel.core.masked import (
    check_shapes,
    last_counted_index,
    masked_mean,
    masked_moments,
    masked_sum,
    whiten,
    zero_outside,
)

from .expect import close

R2 = 1.41421356
ONE_TO_FIVE = [[1.0, 2.0, 3.0, 4.0, 5.0]]
ALL_FIVE = torch.ones(1, 5, dtype=torch.bool)


def test_whiten_divides_by_the_biased_deviation_and_drops_the_mean() -> None:
    close(whiten(torch.tensor(ONE_TO_FIVE), ALL_FIVE), [[-R2, -0.70710678, 0.0, 0.70710678, R2]])


def test_whitened_numbers_have_mean_zero_and_variance_one() -> None:
    x = torch.randn(8, 9, generator=torch.Generator().manual_seed(0)) * 7 + 100
    mask = torch.rand(8, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    whitened = whiten(x, mask)[mask]
    close(whitened.mean(), 0.0, atol=1e-7)
    close(whitened.var(correction=0), 1.0, atol=1e-6)


@pytest.mark.parametrize("pad", [0.0, 1e9, -1e9, float("nan"), float("inf")])
def test_whiten_sees_counted_entries_only(pad: float) -> None:
    padded = torch.tensor([[1.0, pad, 2.0, 3.0], [pad, 4.0, 5.0, pad]])
    mask = torch.tensor([[True, False, True, True], [False, True, True, False]])
    close(whiten(padded, mask), [[-R2, 0.0, -0.70710678, 0.0], [0.0, 0.70710678, R2, 0.0]])


@pytest.mark.parametrize("value", [0.1, 0.3, 3.0, -7.7, 1e6 + 0.1])
@pytest.mark.parametrize("count", [1, 2, 3, 6, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_numbers_whiten_to_exact_zeros(value: float, count: int, dtype: torch.dtype) -> None:
    x = torch.full((1, count), value, dtype=dtype)
    mask = torch.ones_like(x, dtype=torch.bool)
    assert whiten(x, mask).eq(0).all()


def test_one_counted_token_has_no_variance() -> None:
    x, one = torch.tensor([[3.0, 8.0]]), torch.tensor([[True, False]])
    close(whiten(x, one), [[0.0, 0.0]], atol=0.0)
    assert [float(moment) for moment in masked_moments(x, one)] == [3.0, 0.0]


def test_without_a_counted_token_moments_are_zero_and_a_mean_is_refused() -> None:
    x, nothing = torch.tensor([[3.0, 8.0]]), torch.zeros(1, 2, dtype=torch.bool)
    assert [float(moment) for moment in masked_moments(x, nothing)] == [0.0, 0.0]
    close(whiten(x, nothing), [[0.0, 0.0]], atol=0.0)
    with pytest.raises(ValueError, match="no entry"):
        masked_mean(x, nothing)


def test_the_sums_of_all_ranks_give_the_moments_of_all_rows() -> None:
    """Two ranks with the same rows: all sums are twice those of one rank, and the moments are the same."""
    x, mask = torch.tensor([ONE_TO_FIVE[0], [6.0, 7.0, 8.0, 9.0, 0.0]]), torch.ones(2, 5, dtype=torch.bool)
    mask[1, 4] = False
    for all_sum in (lambda total: total, lambda total: 2 * total):
        mean, var = masked_moments(x, mask, all_sum)
        close(mean, 5.0)
        close(var, 60 / 9)
        close(whiten(x, mask, all_sum), whiten(x, mask).tolist())


def test_sums_and_means_of_two_rows_of_unequal_length() -> None:
    loss = torch.tensor([[2.0, 99.0, float("nan")], [1.0, 1.0, 1.0]])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    close(masked_sum(loss, mask), 5.0)
    close(masked_sum(loss, mask, dim=1), [2.0, 3.0])
    close(masked_mean(loss, mask), 1.25)  # the mean over tokens; 1.5 would be the mean of the rows' means


def test_masked_places_get_no_gradient_even_from_nan() -> None:
    x = torch.tensor([[1.0, float("nan")]], requires_grad=True)
    (grad,) = torch.autograd.grad(masked_mean(x, torch.tensor([[True, False]])), x)
    close(grad, [[1.0, 0.0]])


def test_last_counted_is_the_last_true_of_each_row_gaps_or_not() -> None:
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0]]).bool()
    assert last_counted_index(mask).tolist() == [0, 3, 3, 2]
    with pytest.raises(ValueError, match="no counted token"):
        last_counted_index(torch.tensor([[True, False], [False, False]]))


def test_shapes_never_broadcast() -> None:
    check_shapes(torch.ones(2, 3), torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3,\)"):
        check_shapes(torch.ones(2, 3), torch.ones(3))
    with pytest.raises(ValueError, match="shapes differ"):
        zero_outside(torch.ones(2, 3), torch.ones(2, 1, dtype=torch.bool))
