"""Each kernel gives what torch computes in double precision, gradients too; and the same for any number of threads."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from keel import kernels

pytestmark = pytest.mark.skipif(not kernels.available(), reason="there is no C compiler here")

LENGTHS = [1, 15, 16, 17, 40, 3]
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 31 * sum(shape)))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    """One row, the long way. query [L, heads, D], key and value [L, kv_heads, D]"""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = torch.einsum("ihd,jhd->hij", query, key) * scaling
    distance = torch.arange(len(query)).unsqueeze(1) - torch.arange(len(query))
    hidden = (distance < 0) | (distance >= (window or len(query)))
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -math.inf).softmax(-1), value)


@pytest.mark.parametrize("window", [None, 1, 5, 16, 20])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 8), (2, 2, 16), (3, 1, 24), (2, 1, 64)])
def test_attention_and_its_gradient(heads: int, kv_heads: int, size: int, turned: bool, window: int | None) -> None:
    count, starts = sum(LENGTHS), torch.tensor([0, *LENGTHS]).cumsum(0)
    query, key, value = (numbers(count, n, size, seed=i) for i, n in enumerate((heads, kv_heads, kv_heads)))
    angle = numbers(count, 1, size // 2, seed=3)
    rotation = (angle.cos(), angle.sin()) if turned else None
    given = query, key, value, starts, 0.4, rotation, window
    found, statistics = kernels.attend(*given)
    outward = numbers(count, heads, size, seed=4)
    gradients = kernels.attend_back(*given, found, statistics, outward)

    exact = [x.double().requires_grad_() for x in (query, key, value)]
    q, k = (rotated(x, angle.double().cos(), angle.double().sin()) if turned else x for x in exact[:2])
    rows = zip(*(x.split(LENGTHS) for x in (q, k, exact[2])), strict=True)
    expected = torch.cat([attention(*row, 0.4, window) for row in rows])
    torch.testing.assert_close(found.double(), expected, **CLOSE)
    for ours, wanted in zip(gradients, torch.autograd.grad(expected, exact, outward.double()), strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-5)


def test_scores_that_would_overflow() -> None:
    """The largest score is taken off before the exponential."""
    x = 30 * numbers(20, 1, 8)
    found, _ = kernels.attend(x, x, x, torch.tensor([0, 20]), 1.0)
    torch.testing.assert_close(found.double(), attention(*[x.double()] * 3, 1.0, None), **CLOSE)


def test_a_number_that_is_none_stays_one() -> None:
    """The checks for divergence must see it; rows beside it are spared."""
    x = numbers(20, 1, 8)
    x[3, 0, 0] = math.nan
    found, _ = kernels.attend(x, x, x, torch.tensor([0, 3, 10, 20]), 1.0)
    assert [bool(row.isnan().any()) for row in (found[:3], found[3:10], found[10:])] == [False, True, False]
    assert kernels.rms_norm(x, torch.ones(8), 1e-5)[0].isnan().any()
    assert kernels.silu_gate(x, x).isnan().any()
    assert kernels.logprobs_with_entropy(x[:, 0], torch.zeros(20, dtype=torch.int64))[0].isnan().nonzero().tolist() == [
        [3]
    ]


@pytest.mark.parametrize("size", [1, 8, 64, 172])
def test_norm_and_its_gradient(size: int) -> None:
    x, weight, outward = numbers(150, 2, size), numbers(size, seed=1), numbers(150, 2, size, seed=2)
    y, scales = kernels.rms_norm(x, weight, 1e-5)
    exact = [each.double().requires_grad_() for each in (x, weight)]
    expected = exact[1] * exact[0] / (exact[0].square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(y.double(), expected, **CLOSE)
    ours = kernels.rms_norm_back(x, weight, scales, outward)
    for gradient, wanted in zip(ours, torch.autograd.grad(expected, exact, outward.double()), strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16, 33])
@pytest.mark.parametrize(("size", "outputs"), [(1, 1), (8, 6), (13, 7), (64, 12), (40, 1000), (160, 13)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_map(rows: int, size: int, outputs: int, biased: bool, dtype: torch.dtype) -> None:
    """bfloat16 weights: the inputs are rounded, and nothing else is."""
    x, weight = numbers(rows, size, seed=1), numbers(outputs, size, seed=2).to(dtype)
    bias = numbers(outputs, seed=3).to(dtype) if biased else None
    found = kernels.linear(x.unsqueeze(0), weight, bias)
    assert found.dtype is torch.float32
    expected = x.to(dtype).double() @ weight.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(found.double(), expected.unsqueeze(0), **CLOSE)


@pytest.mark.parametrize("rows", [1, 12, 13, 40])
@pytest.mark.parametrize(("size", "outputs"), [(32, 1), (64, 31), (96, 32), (576, 75), (40, 10)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_of_many_rows(rows: int, size: int, outputs: int, biased: bool) -> None:
    x, weight = numbers(rows, size, seed=1), numbers(outputs, size, seed=2).bfloat16()
    bias = numbers(outputs, seed=3) if biased else None
    expected = x.bfloat16().double() @ weight.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(kernels.product(x, weight, bias).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 16, 40, 172])
def test_in_bfloat16_only_what_linear_maps_read_and_return_is_rounded(size: int) -> None:
    """torch's casts and formulas in double precision of the same rounded numbers, rounded once at the end."""
    x, weight = numbers(150, size), numbers(size, seed=1).bfloat16()
    gate, up, outward = (4 * numbers(150, size, seed=seed).bfloat16() for seed in (2, 3, 4))
    normed, scales = kernels.rms_norm(x, weight, 1e-5)
    given = [each.double().requires_grad_() for each in (x, weight, gate, up)]
    expected = given[1] * given[0] / (given[0].square().mean(-1, keepdim=True) + 1e-5).sqrt()
    gated = silu(given[2]) * given[3]
    for ours, exact in ((normed, expected), (kernels.silu_gate(gate, up), gated)):
        assert ours.dtype is torch.bfloat16
        torch.testing.assert_close(ours.double(), exact, rtol=2**-8, atol=1e-5)
    ours = *kernels.rms_norm_back(x, weight, scales, outward), *kernels.silu_gate_back(gate, up, outward)
    wanted = torch.autograd.grad((expected * outward).sum() + (gated * outward).sum(), given)
    assert [each.dtype for each in ours] == [torch.float32, *[torch.bfloat16] * 3]
    torch.testing.assert_close(ours[0].double(), wanted[0], rtol=1e-4, atol=1e-3)
    for narrow, exact in zip(ours[1:], wanted[1:], strict=True):
        torch.testing.assert_close(narrow.double(), exact, rtol=2**-8, atol=2e-3)


def test_rounding_is_that_of_torch() -> None:
    """Ties go to even numbers, numbers above the largest become infinite, and NaN stays."""
    x = torch.tensor([1.00390625, 1.01171875, -1.00390625, 3.3e38, 3.4e38, math.inf, -math.inf, 1e-30, 0.0])
    rows = x.unsqueeze(1)
    assert torch.equal(kernels.linear(rows, torch.ones(1, 1).bfloat16()), rows.bfloat16().float())
    assert kernels.rms_norm(torch.full((1, 40), math.nan), torch.ones(40).bfloat16(), 0.0)[0].isnan().all()


@pytest.mark.parametrize(("weight", "bias"), [((5, 16), None), ((5, 8), 4)])
def test_a_linear_map_of_other_shapes_is_refused(weight: tuple[int, int], bias: int | None) -> None:
    with pytest.raises(ValueError, match="differ"):
        kernels.linear(numbers(3, 8), numbers(*weight), None if bias is None else numbers(bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_map_of_a_row_does_not_depend_on_the_other_rows(dtype: torch.dtype) -> None:
    x, weight = numbers(19, 77), numbers(50, 77).to(dtype)
    together = kernels.linear(x, weight)
    for count in (1, 2, 3, 4):
        assert torch.equal(torch.cat([kernels.linear(part, weight) for part in x.split(count)]), together)


@pytest.mark.parametrize("count", [1, 16, 37])
def test_the_gated_unit_and_its_gradient(count: int) -> None:
    gate, up, outward = 4 * numbers(count), numbers(count, seed=1), numbers(count, seed=2)
    gate[0] = -200.0  # its sigmoid is nothing
    exact = [each.double().requires_grad_() for each in (gate, up)]
    expected = silu(exact[0]) * exact[1]
    torch.testing.assert_close(kernels.silu_gate(gate, up).double(), expected, **CLOSE)
    ours = kernels.silu_gate_back(gate, up, outward)
    for gradient, wanted in zip(ours, torch.autograd.grad(expected, exact, outward.double()), strict=True):
        torch.testing.assert_close(gradient.double(), wanted, **CLOSE)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("words", [2, 16, 50, 1100])
def test_logprobs_entropy_and_the_gradient(words: int, temperature: float) -> None:
    logits, tokens = 5 * numbers(40, words), torch.arange(40) % words
    outward, slope = numbers(40, seed=1), numbers(40, seed=2)
    logits[5, (5 % words) - 1] = -math.inf  # an impossible word
    found, entropies, statistics = kernels.logprobs_with_entropy(logits, tokens, temperature)
    exact = logits.double().requires_grad_()
    every = (exact / temperature).log_softmax(-1)
    expected = every.gather(1, tokens.unsqueeze(1)).squeeze(1)
    expected_entropies = -(every.exp() * every.clamp(min=-1e4)).sum(-1)
    torch.testing.assert_close(found.double(), expected, **CLOSE)
    torch.testing.assert_close(entropies.double(), expected_entropies, **CLOSE)
    given = logits, tokens, statistics, outward
    [wanted] = torch.autograd.grad(expected, exact, outward.double(), retain_graph=True)
    torch.testing.assert_close(kernels.logprobs_with_entropy_back(*given, None, temperature).double(), wanted, **CLOSE)
    [more] = torch.autograd.grad(expected_entropies, exact, slope.double())
    ours = kernels.logprobs_with_entropy_back(*given, slope, temperature)
    torch.testing.assert_close(ours.double(), wanted + more, **CLOSE)


@pytest.mark.parametrize("token", [-1, 5])
def test_a_token_that_is_none_is_refused(token: int) -> None:
    with pytest.raises(IndexError, match="5 logits"):
        kernels.logprobs_with_entropy(numbers(1, 5), torch.tensor([token]))


@pytest.mark.usefixtures("float64")
def test_the_default_type_does_not_matter() -> None:
    x, weight, tokens = numbers(20, 8).float(), torch.ones(8, dtype=torch.float32), torch.zeros(20, dtype=torch.int64)
    results = [
        *kernels.rms_norm(x, weight, 1e-5),
        *kernels.logprobs_with_entropy(x, tokens),
        kernels.draw(x, x[:, 0].double(), 1.0)[1],
    ]
    assert {result.dtype for result in results} == {torch.float32}


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 8), (2, 1, 24), (2, 2, 64)])
def test_attention_of_the_newest_token(heads: int, kv_heads: int, size: int) -> None:
    """Token by token over a cache in blocks, beside attention over the whole row; the rows begin at 0, 3 and 20."""
    first, length = torch.tensor([0, 3, 20]), 40
    query, key, value = (numbers(3, length, n, size, seed=i) for i, n in enumerate((heads, kv_heads, kv_heads)))
    angle = numbers(3, length, 1, size // 2, seed=3)
    cache = torch.full(
        (2, 3, kv_heads, -(-length // kernels.lanes()), size, kernels.lanes()), 7.0
    )  # what is not yet written must not matter
    for column in range(length):
        given = query[:, column], key[:, column], value[:, column], (angle[:, column].cos(), angle[:, column].sin())
        found = kernels.attend_newest(*given, first, cache, column, 0.4)
        for row in range(3):
            if column < first[row]:
                continue
            seen = slice(int(first[row]), column + 1)
            cos, sin = angle[row, seen].double().cos(), angle[row, seen].double().sin()
            q, k = (rotated(x[row, seen].double(), cos, sin) for x in (query, key))
            expected = attention(q, k, value[row, seen].double(), 0.4, None)[-1]
            torch.testing.assert_close(found[row].double(), expected, **CLOSE)


@pytest.mark.parametrize(("words", "temperature"), [(5, 1.0), (16, 0.7), (200, 1.3)])
def test_the_draw_is_the_inverse_of_the_cumulative_distribution(words: int, temperature: float) -> None:
    logits = 3 * numbers(500, words)
    uniforms = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens, logprobs = kernels.draw(logits, uniforms, temperature)
    every = (logits.double() / temperature).log_softmax(-1)
    cumulative = every.exp().cumsum(-1)
    assert torch.equal(tokens, (cumulative <= uniforms.unsqueeze(1)).sum(-1))
    torch.testing.assert_close(logprobs.double(), every.gather(1, tokens.unsqueeze(1)).squeeze(1), **CLOSE)


def test_the_draw_never_takes_an_impossible_word() -> None:
    logits = torch.full((4, 40), -math.inf)
    logits[:, 3], logits[:, 17] = 0.0, 0.0
    uniforms = torch.tensor([0.0, 0.4999, 0.5, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    tokens, logprobs = kernels.draw(logits, uniforms, 1.0)
    assert tokens.tolist() == [3, 3, 17, 17]
    torch.testing.assert_close(logprobs, torch.full((4,), -math.log(2)))


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("two_threads")
def test_threads_change_no_bit() -> None:
    x, gate, starts = numbers(600, 4, 16), numbers(600, 64), torch.arange(0, 601, 25)
    logits, tokens, uniforms = numbers(600, 50), torch.arange(600) % 50, torch.rand(600, dtype=torch.float64)

    def results() -> list[Tensor]:
        found, statistics = kernels.attend(x, x, x, starts, 0.3)
        y, scales = kernels.rms_norm(gate, gate[0], 1e-5)
        chosen, entropies, normalisers = kernels.logprobs_with_entropy(logits, tokens)
        back = kernels.attend_back(x, x, x, starts, 0.3, None, None, found, statistics, x)
        others = kernels.rms_norm_back(gate, gate[0], scales, gate), kernels.silu_gate_back(gate, gate, gate)
        last = (
            kernels.logprobs_with_entropy_back(logits, tokens, normalisers, chosen),
            *kernels.draw(logits, uniforms, 1.0),
        )
        return [found, y, chosen, entropies, *back, *(each for pair in others for each in pair), *last]

    both = results()
    torch.set_num_threads(1)
    assert all(torch.equal(ours, alone) for ours, alone in zip(both, results(), strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_log_probability_of_a_draw_is_exact_for_offset_logits(temperature: float) -> None:
    logits = 3 * numbers(20, 32_000) + 3000
    uniforms = torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens, logprobs = kernels.draw(logits, uniforms, temperature)
    every = (logits.double() / temperature).log_softmax(-1)
    expected = every.gather(1, tokens.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=2e-6)
