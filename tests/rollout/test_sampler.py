"""The sampler against the slow way to sample; the laws and masks that oracles know are in tests/oracles."""

from pathlib import Path
from typing import Any

import pytest
import torch

from keel.data.prompts import Prompt
from keel.models.loading import load_causal_lm, load_tokenizer
from keel.rollout.sampler import choose_tokens, sample_rollouts

END = 2


@pytest.fixture(params=["tiny_policy", "tiny_gpt2"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def prompt(*tokens: int) -> Prompt:
    return Prompt("", "", tokens, {})


def uniforms(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_choose_inverts_the_cumulative_distribution() -> None:
    numbers = torch.tensor([0.0, 0.05, 0.11, 0.29, 0.31, 0.59, 0.61, 0.999])
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(8, 4) + 5.0
    tokens, logprobs = choose_tokens(logits, numbers, temperature=1.0)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert logprobs.tolist() == pytest.approx([-2.302585] * 2 + [-1.609438] * 2 + [-1.203973] * 2 + [-0.916291] * 2)


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (1.0, [-0.40760596, -1.40760596, -2.40760596]),
        (0.7, [-0.2601184, -1.68868983, -3.11726126]),
        (2.0, [-0.68026967, -1.18026967, -1.68026967]),
    ],
)
def test_choose_divides_logits_by_the_temperature(temperature: float, expected: list[float]) -> None:
    probabilities = torch.tensor(expected).exp()
    middles = probabilities.cumsum(0) - probabilities / 2
    tokens, logprobs = choose_tokens(torch.tensor([[2.0, 1.0, 0.0]] * 3), middles, temperature)
    assert tokens.tolist() == [0, 1, 2]
    assert logprobs.tolist() == pytest.approx(expected, abs=1e-6)


def test_choose_never_takes_an_impossible_token() -> None:
    """A vocabulary that is padded beyond the tokenizer's has such tokens at its end."""
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]] * 2)
    tokens, logprobs = choose_tokens(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), temperature=1.0)
    assert tokens.tolist() == [1, 3]
    assert logprobs.tolist() == pytest.approx([-0.693147] * 2, abs=1e-6)


def test_logprobs_of_truncated_sampling_are_those_of_the_truncated_distribution() -> None:
    """Else the mean of log pi - log pi_ref is no KL: it may be negative."""
    logits = torch.tensor([[0.5, 0.4, 0.0, 0.0]] * 2)
    for limits in ({"top_k": 2}, {"top_p": 0.5}):
        tokens, logprobs = choose_tokens(logits, torch.tensor([0.1, 0.9]), 1.0, **limits)
        assert tokens.tolist() == [0, 1]
        assert logprobs.tolist() == pytest.approx([-0.6443967, -0.7443967], abs=1e-6)


@torch.no_grad()
def slowly(model: Any, tokens: tuple[int, ...], numbers: torch.Tensor, ends: set[int], temperature: float) -> list[int]:
    """One row, unpadded, no cache: the whole text is read again for each token."""
    answer: list[int] = []
    for number in numbers:
        logits = model(input_ids=torch.tensor([[*tokens, *answer]]), use_cache=False).logits[0, -1]
        cumulative = (logits / temperature).double().softmax(-1).cumsum(0)
        answer.append(int((cumulative <= number * cumulative[-1]).sum()))
        if answer[-1] in ends:
            break
    return answer


@pytest.mark.parametrize(("temperature", "ends"), [(1.0, {END}), (0.7, {END}), (1.3, {END, 7, 11, 19})])
def test_batched_answers_are_those_of_the_slow_way(folder: Path, temperature: float, ends: set[int]) -> None:
    model, tokenizer = load_causal_lm(str(folder)), load_tokenizer(str(folder))
    prompts = [prompt(5), prompt(6, 7, 8, 9, 10), prompt(END, 4, END), prompt(12, 0, 13), prompt(1), prompt(7, 7)]
    numbers = uniforms(6, 12)
    rollouts = sample_rollouts(model, prompts, tokenizer, numbers, sorted(ends), temperature)
    for row, given in enumerate(prompts):
        expected = slowly(model, given.tokens, numbers[row], ends, temperature)
        assert rollouts.response_tokens[row][rollouts.response_mask[row]].tolist() == expected
        assert rollouts.truncated[row].item() is (expected[-1] not in ends)
        assert rollouts.response_mask[row].tolist() == [t < len(expected) for t in range(rollouts.lengths.max())]


def test_tiny_model_two_tokens_follow_the_exact_law(tiny_policy: Path) -> None:
    """Chi-squared over all pairs of tokens that are expected at least 10 times in 20 000, the rest in one cell."""
    model, tokenizer = load_causal_lm(str(tiny_policy)), load_tokenizer(str(tiny_policy))
    with torch.no_grad():
        first = model(input_ids=torch.tensor([[5]])).logits[0, -1].double().softmax(-1)
        second = model(input_ids=torch.tensor([[5, y] for y in range(32)])).logits[:, -1].double().softmax(-1)
    law = first.unsqueeze(1) * second
    law[END] = 0.0
    law[END, 0] = first[END]  # the end token has nothing after it
    rollouts = sample_rollouts(model, [prompt(5)] * 20_000, tokenizer, uniforms(20_000, 2, seed=3), [END])
    pairs = rollouts.response_tokens[:, 0] * 32 + rollouts.response_tokens[:, 1]
    counts = torch.bincount(pairs, minlength=1024).double()
    expected = 20_000 * law.flatten()
    likely = expected >= 10
    cells = torch.cat([counts[likely], counts[~likely].sum().view(1)])
    means = torch.cat([expected[likely], expected[~likely].sum().view(1)])
    degrees = len(cells) - 1
    assert degrees > 100
    assert float(((cells - means) ** 2 / means).sum()) < degrees + 4 * (2 * degrees) ** 0.5


def test_a_finished_row_leaves_the_batch(tiny_policy: Path) -> None:
    model, tokenizer = load_causal_lm(str(tiny_policy)), load_tokenizer(str(tiny_policy))
    sizes: list[int] = []
    handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *a: sizes.append(a[2].shape[0]))
    rollouts = sample_rollouts(model, [prompt(5)] * 16, tokenizer, uniforms(16, 10), [END, 7, 11, 19])
    handle.remove()
    expected = [int((rollouts.lengths > t).sum()) for t in range(int(rollouts.lengths.max()))]
    assert sizes == [1, *expected[1:]]  # the prompt, which is the same for all, is read once
    assert sizes[-1] < sizes[1] == 16 - int((rollouts.lengths == 1).sum())


def test_texts_keep_their_space_and_lose_the_end(tiny_policy: Path) -> None:
    model, tokenizer = load_causal_lm(str(tiny_policy)), load_tokenizer(str(tiny_policy))
    rollouts = sample_rollouts(model, [prompt(5)] * 16, tokenizer, uniforms(16, 3), [END])
    for row, text in enumerate(rollouts.texts):
        tokens = rollouts.response_tokens[row][rollouts.response_mask[row]].tolist()
        assert text == "".join(f" w{token - 4}" for token in tokens if token > 3)
    assert rollouts.truncated.any()


@pytest.mark.parametrize("in_text", [True, False])
def test_the_text_of_a_stop_token_that_is_a_word(tiny_policy: Path, in_text: bool) -> None:
    """Special and added end tokens are never text."""
    model, tokenizer = load_causal_lm(str(tiny_policy)), load_tokenizer(str(tiny_policy))
    tokenizer.add_tokens(["w8"])  # a marker that is not special
    ends = [END, 7, 11, 12]  # </s>, w3, w7, w8
    rollouts = sample_rollouts(model, [prompt(5)] * 64, tokenizer, uniforms(64, 6), ends, stop_in_text=in_text)
    unwritten = {END, 12} if in_text else {END, 7, 11, 12}
    ended: set[int] = set()
    for row, text in enumerate(rollouts.texts):
        tokens = rollouts.response_tokens[row][rollouts.response_mask[row]].tolist()
        ended.add(tokens[-1])
        assert text.split() == [f"w{token - 4}" for token in tokens if token > 3 and token not in unwritten]
    assert ended >= set(ends)


def test_one_token_at_most(folder: Path) -> None:
    model, tokenizer = load_causal_lm(str(folder)), load_tokenizer(str(folder))
    rollouts = sample_rollouts(model, [prompt(5), prompt(6, 7)], tokenizer, uniforms(2, 1), [END])
    assert rollouts.response_tokens.shape == (2, 1)
    assert rollouts.response_mask.all()
