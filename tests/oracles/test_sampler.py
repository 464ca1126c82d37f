"""The sampler's law is the policy's. Which tokens count, whatever pads, ends and prompts look like."""

import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from keel.core.rewards import place_scores
from keel.data.prompts import Prompt
from keel.models.actor_critic import ActorCritic
from keel.models.loading import load_causal_lm, load_tokenizer
from keel.rollout.sampler import keep_likely, sample_rollouts

from . import t3
from .system import plain_logits, rollouts_of, uniforms_for

START = 3  # a token that only prompts hold
END = 2
KINDS = ["tiny_policy", "tiny_gpt2"]  # rotary positions, pad apart from end; absolute positions, pad = end


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def t3_model() -> LlamaForCausalLM:
    """A Llama that is T3's reference: attention and MLP add nothing, so only the token before counts."""
    config = LlamaConfig(
        vocab_size=4,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        rms_norm_eps=0.0,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    rows = [t3.REFERENCE[0], t3.REFERENCE[1], [0.0, 0.0, 0.0], t3.REFERENCE[None]]
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(4))  # the last norm makes a 2 of the 1
        model.lm_head.weight.copy_(torch.tensor([[*row, -60.0] for row in rows]).T / 2)
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
    return model


def prompt(tokens: tuple[int, ...]) -> Prompt:
    return Prompt("", "", tokens, {})


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_twenty_thousand_answers_follow_the_exact_law(
    t3_model: LlamaForCausalLM, tiny_gpt2: Path, temperature: float
) -> None:
    """Chi-squared with 14 degrees of freedom; 42.58 is passed by one right sampler in 10 000. Left padding included."""
    count = 20_000
    prompts = [prompt(((START,), (0, START), (1, 0, START))[i % 3]) for i in range(count)]
    uniforms = torch.rand(count, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rollouts = sample_rollouts(t3_model, prompts, load_tokenizer(str(tiny_gpt2)), uniforms, [t3.END], temperature)
    table = {word: [z / temperature for z in logits] for word, logits in t3.REFERENCE.items()}
    rows = zip(rollouts.response_tokens.tolist(), rollouts.lengths.tolist(), strict=True)
    drawn = [tuple(tokens[:length]) for tokens, length in rows]
    expected = {answer: count * math.exp(t3.logprob(answer, table=table)) for answer in t3.ANSWERS}
    assert sum(expected.values()) == pytest.approx(count)
    assert sum((drawn.count(y) - n) ** 2 / n for y, n in expected.items()) < 42.58
    logprobs = rollouts.logprobs.masked_fill(~rollouts.response_mask, 0.0).sum(1).tolist()
    assert logprobs == pytest.approx([t3.logprob(y, table=table) for y in drawn], abs=1e-5)


def test_the_systems_logprobs_of_all_answers(t3_model: LlamaForCausalLM) -> None:
    rollouts = rollouts_of([(START,), (0, START), (1, 0, START)] * 5, t3.ANSWERS)
    logprobs = ActorCritic(t3_model).analyze(rollouts, temperature=1.0).logprobs.sum(1).tolist()
    assert logprobs == pytest.approx([t3.logprob(answer) for answer in t3.ANSWERS], abs=1e-6)
    assert sum(map(math.exp, logprobs)) == pytest.approx(1.0, abs=1e-6)


def test_an_answer_depends_on_its_own_numbers_alone(folder: Path) -> None:
    """Alone, in a batch of eight, in another order: the same tokens and the same log-probs."""
    model, tokenizer = load_causal_lm(str(folder)), load_tokenizer(str(folder))
    prompts = [prompt(tuple(range(4, 5 + i % 5))) for i in range(8)]
    uniforms = torch.rand(8, 6, generator=torch.Generator().manual_seed(1))
    ends = list(range(END, 32, 4))  # so many that rows leave the batch at different times
    together = sample_rollouts(model, prompts, tokenizer, uniforms, ends, 0.7)
    backwards = sample_rollouts(model, prompts[::-1], tokenizer, uniforms.flip(0), ends, 0.7)
    assert together.lengths.unique().numel() >= 3
    for row in range(8):
        alone = sample_rollouts(model, [prompts[row]], tokenizer, uniforms[row : row + 1], ends, 0.7)
        for other, place in ((alone, 0), (backwards, 7 - row)):
            ours, theirs = together.response_mask[row], other.response_mask[place]
            assert torch.equal(together.response_tokens[row][ours], other.response_tokens[place][theirs])
            torch.testing.assert_close(
                together.logprobs[row][ours], other.logprobs[place][theirs], rtol=1e-5, atol=1e-5
            )
            assert together.texts[row] == other.texts[place]


CASES = [  # prompt, reply, tokens that count, truncated
    ((5,), (END,), 1, False),
    ((5, 6, 7), (5, END), 2, False),
    ((4, 5, 6, 7, 8), (5, 6, 7, END), 4, False),
    ((5,), (5, 6, 7, 8), 4, True),
    ((5, 6, 7), (END, END, 5, 6), 1, False),  # nothing comes after the first end
    ((END, 5, 0, END, 0), (5, END), 2, False),  # ends and pads in the prompt are text
    ((0,), (0, 0, END), 3, False),  # a sampled token that is the pad id of some models counts like any other
    ((6, 6, END), (6, 6, 6, 0), 4, True),
]


def test_which_tokens_count(folder: Path) -> None:
    model, tokenizer = load_causal_lm(str(folder)), load_tokenizer(str(folder))
    if tokenizer.pad_token_id == END:
        assert model.config.pad_token_id == END
    prompts = [prompt(tokens) for tokens, *_ in CASES]
    uniforms = torch.tensor([(uniforms_for(model, p, y) + [0.5] * 4)[:4] for p, y, *_ in CASES])
    rollouts = sample_rollouts(model, prompts, tokenizer, uniforms, [END])
    assert rollouts.response_mask.shape == (8, 4)
    for row, (_, reply, count, truncated) in enumerate(CASES):
        assert rollouts.response_mask[row].tolist() == [True] * count + [False] * (4 - count)
        assert rollouts.response_tokens[row, :count].tolist() == list(reply[:count])
        assert rollouts.truncated[row].item() is truncated
        assert rollouts.prompt_mask[row].sum() == len(CASES[row][0])
    placed = place_scores(torch.ones(8), rollouts.response_mask)
    assert placed.argmax(1).tolist() == [count - 1 for _, _, count, _ in CASES]


def test_several_end_tokens(folder: Path) -> None:
    model, tokenizer = load_causal_lm(str(folder)), load_tokenizer(str(folder))
    replies = [(5, 7), (END,), (5, 6, 5)]
    uniforms = torch.tensor([(uniforms_for(model, (4,), y) + [0.5] * 3)[:3] for y in replies])
    for in_text, first in ((True, ["w1", "w3"]), (False, ["w1"])):
        rollouts = sample_rollouts(model, [prompt((4,))] * 3, tokenizer, uniforms, [END, 7], stop_in_text=in_text)
        assert rollouts.lengths.tolist() == [2, 1, 3]
        assert rollouts.truncated.tolist() == [False, False, True]
        assert [text.split() for text in rollouts.texts] == [first, [], ["w1", "w2", "w1"]]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_sampled_logprobs_are_those_of_the_tempered_model(folder: Path, temperature: float) -> None:
    model, tokenizer = load_causal_lm(str(folder)), load_tokenizer(str(folder))
    uniforms = torch.rand(4, 5, generator=torch.Generator().manual_seed(2))
    prompts = [prompt((5,)), prompt((6, 7, 8)), prompt((9, 10)), prompt((4,) * 5)]
    rollouts = sample_rollouts(model, prompts, tokenizer, uniforms, [END], temperature)
    for row, given in enumerate(prompts):
        reply = rollouts.response_tokens[row][rollouts.response_mask[row]].tolist()
        logits = plain_logits(model, [*given.tokens, *reply])[len(given.tokens) - 1 : -1]
        expected = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(reply).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(rollouts.logprobs[row, : len(reply)].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 2), (0.6, 3), (0.7, 4)])
def test_top_p_keeps_the_token_that_crosses(top_p: float, kept: int) -> None:
    """The rule of transformers; OpenAI's code would keep one token fewer."""
    logits = torch.tensor([[1.0, 1.01, 1.001, 0.0, 0.0, 0.0, 2.0]])
    assert keep_likely(logits, 0, top_p).isfinite().sum() == kept
    assert keep_likely(logits, 2, 1.0).isfinite().nonzero()[:, 1].tolist() == [1, 6]
