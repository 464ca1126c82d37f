"""The seam where a policy samples: random numbers of rows, and keel's sampler behind it."""

from pathlib import Path

import torch

from keel.data.prompts import Prompt
from keel.models.loading import load_causal_lm, load_tokenizer
from keel.rollout.engine import Draws, OwnSampler
from keel.rollout.sampler import sample_rollouts

PROMPTS = [Prompt(text, text, tokens, {}) for text, tokens in [("a", (5,)), ("b", (6, 7)), ("c", (8, 9, 10))]]


def test_the_numbers_of_a_row_do_not_depend_on_the_other_rows() -> None:
    everything = Draws((7, "sample", 3), 6, range(6))
    part = Draws((7, "sample", 3), 6, [4, 1])
    assert torch.equal(part.uniforms(5), everything.uniforms(5)[[4, 1]])
    assert part.seeds() == [everything.seeds()[4], everything.seeds()[1]]


def test_seeds_differ_between_rows_steps_and_purposes() -> None:
    keys = [(7, "sample", 3), (7, "sample", 4), (7, "reference", 3), (8, "sample", 3)]
    seeds = [seed for key in keys for seed in Draws(key, 4, range(4)).seeds()]
    assert len(set(seeds)) == 16
    assert all(0 <= seed < 2**63 for seed in seeds)
    # sha256 of "(7, 'sample', 3, 0)", the first eight bytes as a little-endian number, halved
    assert Draws((7, "sample", 3), 1, [0]).seeds() == [1_394_098_366_838_101_651]


def test_keels_sampler_gives_the_same_responses_behind_the_seam(tiny_policy: Path) -> None:
    model, tokenizer = load_causal_lm(str(tiny_policy)), load_tokenizer(str(tiny_policy))
    engine = OwnSampler(tokenizer, max_response_tokens=8, temperature=0.7)
    draws = Draws((0, "sample", 1), 5, [4, 0, 2])
    expected = sample_rollouts(model, PROMPTS, tokenizer, draws.uniforms(8)[:, :4], [2], 0.7)
    sampled = engine.sample(model, PROMPTS, draws, [2], max_tokens=4)
    assert torch.equal(sampled.response_tokens, expected.response_tokens)
    assert torch.equal(sampled.logprobs, expected.logprobs)
    assert sampled.texts == expected.texts
    assert not engine.is_external
    engine.close()
