"""A tiny random model learns what people want of its answers, with no reward model in between."""

import json
from pathlib import Path

import pytest

from keel.config import DpoConfig, EvaluateConfig, SampleConfig, parse
from keel.evaluation.evaluate import evaluate_policies
from keel.evaluation.sample import sample_responses
from keel.supervised.dpo import dpo

from ..runs import PROMPTS, lines, share_of_w3

SAMPLING = {"num_responses": 8, "max_response_tokens": 6}


@pytest.mark.parametrize(
    ("loss", "beta", "share"),
    [("sigmoid", 0.3, 0.4), ("listwise", 0.3, 0.4), ("ipo", 0.05, 0.2)],  # IPO ends pairs 1 / (2 beta) apart, no more
)
def test_learns_to_say_w3_from_rankings(
    loss: str, beta: float, share: float, tiny_policy: Path, tmp_path: Path
) -> None:
    """People who like w3 rank eight answers to each of 80 prompts; a random policy says it in 1 word of 25."""
    prompts, answers, data = (tmp_path / name for name in ("prompts.jsonl", "answers.jsonl", "rankings.jsonl"))
    prompts.write_text("".join(json.dumps({"prompt": f"{text} w{i}"}) + "\n" for text in PROMPTS for i in range(20)))
    common = {"prompts": {"path": str(prompts)}, "sampling": SAMPLING}
    sample_responses(parse(SampleConfig, {"model": str(tiny_policy), "output": str(answers), **common}))
    ranked = [row | {"scores": share_of_w3(row["responses"])} for row in lines(answers)]
    data.write_text("".join(json.dumps(row) + "\n" for row in ranked))
    given = {"output": str(tmp_path / "run"), "model": str(tiny_policy), "data": {"path": str(data)}, "loss": loss}
    learn = {"beta": beta, "epochs": 12, "batch_size": 8, "optim": {"learning_rate": 1e-2}}
    figures = dpo(parse(DpoConfig, {**given, **learn}))
    assert figures["accuracy"] > 0.8
    policies = {"policy": str(tmp_path / "run" / "policy"), "against": str(tiny_policy)}
    judged = evaluate_policies(parse(EvaluateConfig, {**policies, **common}), [share_of_w3])
    assert judged["against"]["score"] < 0.1
    assert judged["policy"]["score"] > share
    assert judged["win_rate_low"] > 0.7
    assert 0 < judged["policy"]["kl"] < 30
