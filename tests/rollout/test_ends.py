"""Texts of several tokens end a response as an end token does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from keel.config import SampleConfig, TrainConfig, parse
from keel.data.prompts import encode_prompt
from keel.evaluation.drift.measurement import DriftSetup, logged_rollouts
from keel.evaluation.sample import EvaluatedPolicy, load_frozen_model, sample_responses
from keel.models.loading import load_causal_lm, load_tokenizer
from keel.rollout.ends import Ends
from keel.rollout.sampler import sample_rollouts

from ..runs import settings, train

PAIRS = [f"w{i} w{j}" for i in range(28) for j in range(10, 20)]  # no longer word begins with w10 to w19


def bytewise() -> PreTrainedTokenizerFast:
    """Every byte is a token; "\\n\\n" and "Q:" are tokens too."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, "ĊĊ", "Q:", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ"), ("Q", ":")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def ended_at(text: str, stops: list[str]) -> int | None:
    """After how many tokens of a text a sampler would have stopped."""
    tokenizer = bytewise()
    ends, ids = Ends(tokenizer, [tokenizer.eos_token_id], stops), tokenizer.encode(text, add_special_tokens=False)
    for length in range(1, len(ids) + 1):
        if ends.rows_at_end(torch.tensor([ids[max(0, length - ends.window) : length]]))[0]:
            return length
    return None


@pytest.mark.parametrize(
    ("text", "stops", "length"),
    [
        ("ab\n\nQ: c", ["\nQ:"], 4),  # inside of "\n\n", and over the border to "Q:"
        ("ab.c.d..", ["..", "d."], 7),
        ("so é und ö", ["ö"], 12),  # two bytes, the second of which completes it
        ("stop here</s>", ["here?"], 10),  # by its end token
        ("nothing", ["?!"], None),
    ],
)
def test_a_response_ends_with_the_token_that_completes_a_text(text: str, stops: list[str], length: int | None) -> None:
    assert ended_at(text, stops) == length


@pytest.mark.parametrize("in_text", [True, False])
def test_responses_are_those_without_stop_texts_up_to_their_ends(tiny_policy: Path, in_text: bool) -> None:
    model, tokenizer = load_causal_lm(str(tiny_policy)), load_tokenizer(str(tiny_policy))
    prompts = [encode_prompt(text, tokenizer) for text in ("w1 w2", "w5", "w6 w7 w8") for _ in range(8)]
    uniforms = torch.rand(len(prompts), 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    free = sample_rollouts(model, prompts, tokenizer, uniforms, [2])
    found = sample_rollouts(model, prompts, tokenizer, uniforms, [2], stop_texts=PAIRS, stop_in_text=in_text)
    by_text = 0
    for row, text in enumerate(found.texts):
        length = int(found.response_mask[row].sum())
        assert torch.equal(found.response_tokens[row, :length], free.response_tokens[row, :length])
        words = str(tokenizer.decode(found.response_tokens[row, :length])).split()
        pairs = [" ".join(words[i : i + 2]) in PAIRS for i in range(len(words) - 1)]
        assert not any(pairs[:-1])
        if pairs and pairs[-1]:
            by_text += 1
            assert not found.truncated[row]
            shown = words if in_text else words[:-2]
            assert text.split() == [word for word in shown if word.startswith("w")]
        else:
            assert bool(found.truncated[row]) is bool(free.truncated[row])
    assert by_text > 3


def test_a_run_learns_from_responses_that_a_text_ended(tiny_policy: Path, tmp_path: Path) -> None:
    """The self-check lets it begin, and its checkpoints' answers end as its own did."""
    train(tiny_policy, tmp_path / "run", {"rollout.stop": PAIRS, "steps": 1, "rollout.max_response_tokens": 12})
    rows = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    ended = [row["response"] for row in rows if any(pair in row["response"] for pair in PAIRS)]
    assert ended
    assert all(any(text.endswith(pair) for pair in PAIRS) for text in ended)


def test_a_file_of_samples(tiny_policy: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w1 w2"}\n{"prompt": "w5"}\n')
    sampling: dict[str, Any] = {"stop": ["w3", *PAIRS], "num_responses": 16, "stop_in_text": False}
    given = {"model": str(tiny_policy), "prompts": {"path": str(tmp_path / "prompts.jsonl")}, "sampling": sampling}
    sample_responses(parse(SampleConfig, given | {"output": str(tmp_path / "samples.jsonl")}))
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    texts = [text for line in lines for text in json.loads(line)["responses"]]
    assert not any(pair in f"{text} " for text in texts for pair in ["w3 ", *(f"{pair} " for pair in PAIRS)])


def test_a_logged_response_that_a_text_ended_gets_no_end_token(tiny_policy: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_policy))
    rows = [{"response": " w1 w3"}, {"response": " w1 w4"}]
    prompts = [encode_prompt("w9", tokenizer, row) for row in rows]
    config = parse(TrainConfig, settings(tiny_policy, tmp_path, {"rollout.stop": ["w1 w3"]}))
    player = EvaluatedPolicy("policy", load_frozen_model(str(tiny_policy)), tokenizer, [2], prompts, ("w1 w3",))
    [rollouts] = logged_rollouts(DriftSetup(config, player, None, [], []), "logged.jsonl")
    tokens = [row[mask].tolist() for row, mask in zip(rollouts.response_tokens, rollouts.response_mask, strict=True)]
    assert tokens == [[5, 7], [5, 8, 2]]
