"""Stop tokens that are ordinary words: whether scorers, logs and later stages see them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from keel.config import DecodingSettings, EvaluateConfig, SampleConfig, TrainConfig, parse
from keel.data.prompts import encode_prompt
from keel.evaluation.drift.measurement import DriftSetup, logged_rollouts, training_decoding
from keel.evaluation.evaluate import evaluate_policies
from keel.evaluation.frontier import complete_config
from keel.evaluation.sample import EvaluatedPolicy, load_frozen_model, sample_responses
from keel.models.loading import load_tokenizer

from ..runs import PROMPTS, settings, train

STOP = [f"w{i}" for i in range(14)]  # half of the words, so that many responses end with one


def ends_in_stop(texts: list[str]) -> int:
    return sum(text.split()[-1:] != [] and text.split()[-1] in STOP for text in texts)


def prompts_file(tmp_path: Path) -> str:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return str(file)


@pytest.mark.parametrize("in_text", [True, False])
def test_training_scores_what_the_policy_wrote(tiny_policy: Path, tmp_path: Path, in_text: bool) -> None:
    seen: list[str] = []

    def f(completions: list[str], **_: Any) -> list[float]:
        seen.extend(completions)
        return [float(len(text)) for text in completions]

    changes = {"rollout.stop": STOP, "steps": 1, "evaluate.every": 1, "evaluate.prompts": prompts_file(tmp_path)}
    changes |= {} if in_text else {"rollout.stop_in_text": False}
    train(tiny_policy, tmp_path / "run", changes, scorers=(f,))
    assert (ends_in_stop(seen) > 0) is in_text
    logged = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert (ends_in_stop([row["response"] for row in logged]) > 0) is in_text
    evaluated = seen[-len(PROMPTS) :]
    assert (ends_in_stop(evaluated) > 0) is in_text


@pytest.mark.parametrize("in_text", [True, False])
def test_sampled_files(tiny_policy: Path, tmp_path: Path, in_text: bool) -> None:
    output = tmp_path / "samples.jsonl"
    given = {"model": str(tiny_policy), "prompts": {"path": prompts_file(tmp_path)}, "output": str(output)}
    sampling = {"stop": STOP, "num_responses": 4, "stop_in_text": in_text}
    sample_responses(parse(SampleConfig, given | {"sampling": sampling}))
    texts = [text for line in output.read_text().splitlines() for text in json.loads(line)["responses"]]
    assert (ends_in_stop(texts) > 0) is in_text


def test_checkpoints_are_evaluated_as_they_were_trained(tiny_policy: Path, tmp_path: Path) -> None:
    changes = {"rollout.stop": STOP, "rollout.stop_in_text": False, "steps": 1}
    train(tiny_policy, tmp_path / "run", changes)
    given = {"checkpoints": str(tmp_path / "run"), "prompts": {"path": prompts_file(tmp_path)}}
    sampling = complete_config(parse(EvaluateConfig, given)).sampling
    assert (sampling.stop, sampling.stop_in_text) == (STOP, False)


def test_a_policy_keeps_the_text_of_the_ends_it_learned(tiny_policy: Path, tmp_path: Path) -> None:
    """Saved as end tokens of the model, the stop tokens of the training are treated as before."""
    train(tiny_policy, tmp_path / "run", {"rollout.stop": STOP, "steps": 1})
    given = {"policy": str(tmp_path / "run" / "policy"), "prompts": {"path": prompts_file(tmp_path)}}
    output = tmp_path / "figures.json"
    evaluate_policies(parse(EvaluateConfig, given | {"output": str(output), "sampling": {"num_responses": 4}}))
    texts = [text for row in json.loads(output.read_text())["answers"] for text in row["policy"]]
    assert ends_in_stop(texts) > 0


def test_logged_text_that_ends_with_its_end_token_gets_no_second_one(tiny_policy: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_policy))
    rows = [{"response": " w1 w3"}, {"response": " w1"}, {"response": " w1 w2", "truncated": True}]
    prompts = [encode_prompt("w9", tokenizer, row) for row in rows]
    config = parse(TrainConfig, settings(tiny_policy, tmp_path, {"rollout.stop": ["w3"]}))
    player = EvaluatedPolicy("policy", load_frozen_model(str(tiny_policy)), tokenizer, [2, 7], prompts)
    desk = DriftSetup(config, player, None, [], [])
    assert isinstance(desk.decoding, DecodingSettings)
    assert training_decoding(config).stop_in_text
    [rollouts] = logged_rollouts(desk, "logged.jsonl")
    tokens = [row[mask].tolist() for row, mask in zip(rollouts.response_tokens, rollouts.response_mask, strict=True)]
    assert tokens == [[5, 7], [5, 2], [5, 6]]
    assert torch.equal(rollouts.truncated, torch.tensor([False, False, True]))
