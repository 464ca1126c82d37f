"""Identical responses get identical scores, and what a tempered policy's KL is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from keel.config import EvaluateConfig, parse
from keel.data.batches import Rollouts
from keel.data.prompts import Prompt
from keel.evaluation.evaluate import evaluate_policies
from keel.evaluation.score_once import ScoredOnce, scored_once
from keel.models.ensemble import RewardEnsemble
from keel.models.loading import load_tokenizer
from keel.models.reward_model import RewardModel
from keel.rollout.function_scorer import FunctionScorer
from keel.rollout.scorers import RewardModelScorer


def rollouts(*samples: tuple[str, str], ids: int = 3, **columns: Any) -> Rollouts:
    count = len(samples)
    tokens = torch.full((count, 2), ids)
    mask = torch.ones(count, 2, dtype=torch.bool)
    prompts = [Prompt(prompt, prompt, (1,), columns) for prompt, _ in samples]
    texts = [text for _, text in samples]
    return Rollouts(prompts, tokens, mask, tokens, mask, torch.zeros(count, 2), torch.zeros(count, dtype=bool), texts)


def counting(**takes: Any) -> tuple[list[str], Callable[..., list[float]]]:
    """A function whose score depends on the call, and the responses that it was called with."""
    seen: list[str] = []

    def function(completions: list[str], **columns: Any) -> list[float]:
        seen.extend(completions)
        return [len(seen) + row / 1024 for row in range(len(completions))]

    return seen, function


def test_each_prompt_and_response_is_scored_once_over_calls_and_batches():
    seen, function = counting()
    scorer = ScoredOnce(FunctionScorer(function, "f"))
    first = scorer(rollouts(("p", "a"), ("p", "b"), ("p", "a"), ("q", "a")), None)
    assert seen == ["a", "b", "a"]
    assert first == [3.0, 3 + 1 / 1024, 3.0, 3 + 2 / 1024]
    assert scorer(rollouts(("q", "a"), ("p", "c"), ("p", "b")), None) == [first[3], 4.0, first[1]]
    assert scorer(rollouts(("p", "a"), ids=5), None) == [first[0]]  # another tokenization of the same text
    assert scorer(rollouts(("p", "a"), topic="x"), None) == [5.0]  # the function reads the columns


def test_a_function_that_names_token_ids_is_asked_for_each_tokenization():
    def function(completions: list[str], completion_ids: list[list[int]]) -> list[float]:
        return [float(sum(ids)) for ids in completion_ids]

    scorer = ScoredOnce(FunctionScorer(function, "f"))
    assert [scorer(rollouts(("p", "a"), ids=ids, topic="x"), None) for ids in (3, 5)] == [[6.0], [10.0]]
    assert len(scorer.known) == 2


def test_a_noisy_scorer_is_asked_every_time():
    seen, function = counting()
    (scorer,) = scored_once([FunctionScorer(function, "f", noisy=True)])
    scorer(rollouts(("p", "a"), ("p", "a")), None)
    assert seen == ["a", "a"]


def test_copies_of_a_text_have_one_score_in_whatever_batch(tiny_policy: Path):
    model = RewardModel.load(str(tiny_policy), template="{prompt}{response}")
    torch.manual_seed(0)
    torch.nn.init.normal_(model.head.weight)
    texts = [" ".join(f"w{(7 * i + j) % 28}" for j in range(1 + i % 23)) for i in range(60)]
    rows = [model.encode("w1", text) for text in [*texts, *texts[::-1], *texts[::7]]]
    scores = model.score_rows(rows, microbatch_tokens=64)
    by_text: dict[tuple[int, ...], set[float]] = {}
    for row, score in zip(rows, scores.tolist(), strict=True):
        by_text.setdefault(tuple(row), set()).add(score)
    assert all(len(found) == 1 for found in by_text.values())
    torch.testing.assert_close(scores, model.scores_of_rows(rows, 4096).detach(), rtol=1e-4, atol=1e-5)
    ensemble = ScoredOnce(
        RewardModelScorer(
            RewardEnsemble([model, RewardModel.load(str(tiny_policy), template="{prompt}{response}")]), "e"
        )
    )
    ensemble(rollouts(("w1", "w2"), ("w1", "w3")), None)
    spread = ensemble.disagreement
    assert spread is not None
    ensemble(rollouts(("w1", "w3"), ("w1", "w2")), None)
    assert ensemble.disagreement == spread[::-1]


def settings(policy: Path, tmp_path: Path, rows: list[str], **more: Any) -> EvaluateConfig:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    return parse(EvaluateConfig, {"policy": str(policy), "prompts": {"path": str(path)}, **more})


PROMPTS = [f"w{i} w{j}" for i in range(4) for j in range(5)]


def test_a_policy_ties_with_itself_where_it_has_one_response(tiny_policy: Path, tmp_path: Path):
    """Near temperature 0 all responses to a prompt are the same; the scorer's rounding is that of the call."""
    calls: list[int] = []

    def rounded(completions: list[str], **columns: Any) -> list[float]:
        calls.append(len(completions))
        return [len(text.split()) + len(calls) * 2.0**-20 for text in completions]

    sampling = {"temperature": 1e-5, "num_responses": 3, "batch_size": 7, "max_response_tokens": 5}
    config = settings(tiny_policy, tmp_path, PROMPTS, against=str(tiny_policy), sampling=sampling)
    figures = evaluate_policies(config, [rounded])
    assert (figures["ties"], figures["win_rate"], figures["score_difference"]) == (1.0, 0.5, 0.0)
    assert sum(calls) == 20
    assert figures["win_rate_low"] == pytest.approx(0.5 * 0.025 ** (1 / 20))


def test_rows_and_prompts_are_counted(tiny_policy: Path, tmp_path: Path):
    once = evaluate_policies(settings(tiny_policy, tmp_path, PROMPTS))
    twice = evaluate_policies(settings(tiny_policy, tmp_path, PROMPTS * 2))
    assert (once["prompts"], "rows" in once) == (20, False)
    assert (twice["prompts"], twice["rows"]) == (20, 40)


def test_the_kl_of_a_tempered_policy_and_its_own(tiny_policy: Path, tiny_gpt2: Path, tmp_path: Path):
    """`kl` is that of the sharpened distributions; `kl_untempered` is KL(pi || pi_ref); one token is enumerated."""
    sampling = {"temperature": 0.5, "num_responses": 2_000, "batch_size": 2_000, "max_response_tokens": 1}
    config = settings(tiny_policy, tmp_path, ["w1 w2"], reference=str(tiny_gpt2), sampling=sampling)
    found = evaluate_policies(config)["policy"]
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (tiny_policy, tiny_gpt2)]
    ids = torch.tensor([load_tokenizer(str(tiny_policy)).encode("w1 w2")])
    with torch.no_grad():
        logits = [model(ids).logits[0, -1].double() for model in models]
    expected = {}
    for name, temperature in (("kl", 0.5), ("kl_untempered", 1.0)):
        own, other = ((each / temperature).log_softmax(-1) for each in logits)
        expected[name] = float((own.exp() * (own - other)).sum())
    assert found["kl"] == pytest.approx(expected["kl"], rel=0.1)
    assert found["kl_untempered"] == pytest.approx(expected["kl_untempered"], rel=0.1)
    assert abs(expected["kl"] / expected["kl_untempered"] - 1) > 0.5
    plain = parse(EvaluateConfig, {**config.model_dump(), "sampling": {"max_response_tokens": 1}, "checkpoints": None})
    assert "kl_untempered" not in evaluate_policies(plain)["policy"]
