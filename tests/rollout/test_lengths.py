"""Reward models that cannot read all of a prompt and its response: refused, warned about, counted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from keel.config import EvaluateConfig, ServeRewardConfig, TrainConfig, parse
from keel.data.notes import Notes
from keel.data.preferences import Ranking
from keel.data.prompts import Prompt
from keel.errors import ConfigError
from keel.evaluation.evaluate import evaluate_policies
from keel.models.ensemble import RewardEnsemble
from keel.models.reward_model import RewardModel
from keel.rollout.lengths import length_warnings
from keel.rollout.score import score
from keel.rollout.scorers import RewardModelScorer
from keel.server.reward import PATH, reward_app
from keel.supervised.ranking_task import encode_rankings
from keel.training.policy import train_policy

from ..runs import PROMPTS, lines, settings
from .answers import words


@pytest.fixture
def model(tiny_policy: Path, tmp_path: Path) -> Path:
    """A reward model that reads 5 tokens."""
    made = RewardModel.load(str(tiny_policy), template="{prompt} {response}")
    made.tokenizer.model_max_length = 5
    torch.nn.init.normal_(made.head.weight)
    made.save(tmp_path / "reader" / "model")
    return tmp_path / "reader" / "model"


def prompt(text: str) -> Prompt:
    return Prompt(text, text, (0,) * len(text.split()), {})


def scorer(folder: Path) -> RewardModelScorer:
    return RewardModelScorer(RewardModel.load(str(folder)), "reader")


@pytest.mark.parametrize(("max_response_tokens", "warned"), [(2, False), (3, True)])
def test_a_response_that_may_not_fit_beside_the_longest_prompt(
    model: Path, max_response_tokens: int, warned: bool
) -> None:
    lines = length_warnings([scorer(model)], [prompt("w1"), prompt("w1 w2 w3")], max_response_tokens)
    assert len(lines) == warned
    if warned:
        assert all(part in lines[0] for part in ("scorer reader", "5 tokens (tokenizer.model_max_length)", "have 6."))


@pytest.mark.parametrize(("length", "refused"), [(4, False), (5, True)])
def test_a_prompt_that_does_not_fit_with_one_token(model: Path, length: int, refused: bool) -> None:
    prompts = [prompt("w1"), prompt(" ".join(["w1"] * length))]
    if not refused:
        assert length_warnings([scorer(model)], prompts, 1) == []
        return
    with pytest.raises(
        ConfigError, match=r"scorer reader: the model reads at most 5 tokens .* the longest prompt has 5"
    ):
        length_warnings([scorer(model)], prompts, 1)


def test_texts_longer_than_those_of_the_training(tiny_policy: Path, tmp_path: Path) -> None:
    RewardModel.load(str(tiny_policy), template="{prompt} {response}", max_tokens=4).save(tmp_path / "reader" / "model")
    assert length_warnings([scorer(tmp_path / "reader" / "model")], [prompt("w1 w2")], 2) == []
    [line] = length_warnings([scorer(tmp_path / "reader" / "model")], [prompt("w1 w2")], 3)
    assert "at most 4 tokens" in line
    assert "have 5." in line


def test_members_of_an_ensemble_share_one_line(model: Path) -> None:
    ensemble = RewardEnsemble([RewardModel.load(str(model))] * 2)
    assert len(length_warnings([RewardModelScorer(ensemble, "both")], [prompt("w1 w2 w3")], 3)) == 1


@pytest.mark.parametrize("segments", ["none", "sentence"])
def test_texts_that_were_cut_are_counted(model: Path, segments: str) -> None:
    tokenizer, rollouts = words("w1. w2.", "w1. w2. w3 w4 w5")
    scored = score(rollouts, [scorer(model)], tokenizer, segments)
    assert scored.cut["reader"].tolist() == [False, True]


def run(tiny_policy: Path, model: Path, output: Path, **changes: Any) -> TrainConfig:
    return parse(TrainConfig, settings(tiny_policy, output, {"rewards": [{"model": str(model)}], **changes}))


def test_training_and_evaluation_report_the_share(
    tiny_policy: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_policy(run(tiny_policy, model, tmp_path / "run", steps=1), [], PROMPTS)
    [metrics] = lines(tmp_path / "run" / "metrics.jsonl")
    assert "scorer reader reads at most 5 tokens" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert 0 < metrics["cut/reader"] < 1
    assert any(len(f"{row['prompt']} {row['response']}".split()) > 5 for row in rows)
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    given = {"policy": str(tiny_policy), "prompts": {"path": str(file)}, "rewards": [{"model": str(model)}]}
    figures = evaluate_policies(
        parse(EvaluateConfig, given | {"sampling": {"max_response_tokens": 6, "num_responses": 4}})
    )
    assert 0 < figures["policy"]["cut/reader"] < 1
    assert capsys.readouterr().err.count("scorer reader reads at most 5 tokens") == 1


def test_training_refuses_a_prompt_that_cannot_be_read(tiny_policy: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="scorer reader"):
        train_policy(run(tiny_policy, model, tmp_path / "run"), [], ["w1", "w1 w2 w3 w4 w5"])


def test_the_server_warns_once(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app = reward_app(ServeRewardConfig(model=str(model)), "0123456789abcdef")
    headers = {"Authorization": "Bearer 0123456789abcdef"}
    body = {"query": ["w1 w2 w3 w4 w5 w6", "w1 w2"], "prompts": ["w1", "w1"]}
    with TestClient(app, "http://127.0.0.1:5000", headers=headers) as client:
        for _ in range(3):
            assert client.post(PATH, json=body).status_code == 200
    assert capsys.readouterr().err.count("lost their beginning") == 1


def test_a_reward_models_training_reports_texts_that_were_cut(tiny_policy: Path) -> None:
    made = RewardModel.load(str(tiny_policy), template="{prompt} {response}")
    rankings = [Ranking("w1 w2", ("w3", "w3 w4"), (1, 2))]
    encoded, share = encode_rankings(made, rankings, 3, Notes())
    assert [one.rows for one in encoded] == [[[5, 6, 7], [6, 7, 8]]]
    assert share == 0.5
