"""Models that do not learn are read in the number format that the settings name, in every command that loads one."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from starlette.testclient import TestClient

import keel
from keel.config import DriftConfig, EvaluateConfig, RewardSource, SampleConfig, ServeRewardConfig, parse
from keel.errors import ConfigError
from keel.evaluation.drift.drift import drift
from keel.evaluation.evaluate import evaluate_policies
from keel.evaluation.sample import load_frozen_model, sample_responses
from keel.models.reward_model import RewardModel
from keel.server.reward import PATH, reward_app

from ..runs import lines, settings

TEXTS = ["w3 w9", "w5", "w7 w1 w2"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def reward_model(tiny_policy: Path, tmp_path: Path) -> Path:
    model = RewardModel.load(str(tiny_policy), template="{prompt} {response}")
    torch.manual_seed(0)
    torch.nn.init.normal_(model.head.weight)
    model.save(tmp_path / "scorer")
    return tmp_path / "scorer"


def rounded(exact: float, coarse: float) -> bool:
    """Whether the second is the first with the rounding of bfloat16, which is never none."""
    return coarse != exact and coarse == pytest.approx(exact, rel=0.05, abs=0.05)


def test_frozen_models_have_the_format_asked_for(tiny_policy: Path):
    assert load_frozen_model(str(tiny_policy), "bfloat16").policy.dtype == torch.bfloat16
    assert load_frozen_model(str(tiny_policy)).policy.dtype == torch.float32


def test_evaluate_scores_and_measures_in_bfloat16(
    tiny_policy: Path, tiny_gpt2: Path, prompts: Path, reward_model: Path
):
    def figures(dtype: str) -> dict[str, Any]:
        given: dict[str, Any] = {"policy": str(tiny_policy), "prompts": {"path": str(prompts)}, "dtype": dtype}
        given["rewards"] = [{"model": str(reward_model), "dtype": dtype}]
        sampling = {"max_response_tokens": 4, "temperature": 0}
        return evaluate_policies(parse(EvaluateConfig, {**given, "sampling": sampling}))["policy"]

    exact, coarse = figures("float32"), figures("bfloat16")
    assert rounded(exact["entropy"], coarse["entropy"])
    assert rounded(exact["score"], coarse["score"])


def test_sample_answers_in_bfloat16(tiny_policy: Path, prompts: Path, tmp_path: Path):
    output = str(tmp_path / "answers.jsonl")
    given = {"model": str(tiny_policy), "prompts": {"path": str(prompts)}, "output": output, "dtype": "bfloat16"}
    assert sample_responses(parse(SampleConfig, given))["responses"] == len(TEXTS)


def test_a_run_learns_from_a_reward_model_in_bfloat16_and_drift_reads_both(
    tiny_policy: Path, prompts: Path, reward_model: Path, tmp_path: Path
):
    scorer = [{"model": str(reward_model), "dtype": "bfloat16"}]
    changes = {"rewards": scorer, "steps": 1, "prompts.path": str(prompts)}
    keel.train(settings(tiny_policy, tmp_path / "run", changes))
    assert math.isfinite(lines(tmp_path / "run" / "metrics.jsonl")[0]["rewards/scorer"])
    given = {"run": str(tmp_path / "run"), "prompts": {"path": str(prompts)}, "dtype": "bfloat16"}
    assert drift(parse(DriftConfig, given))["rows"]["today"] == len(TEXTS)


def test_a_reward_model_is_served_in_bfloat16(reward_model: Path):
    def served(dtype: str) -> float:
        app = reward_app(parse(ServeRewardConfig, {"model": str(reward_model), "dtype": dtype}), "token")
        headers = {"authorization": "Bearer token"}
        with TestClient(app, "http://127.0.0.1:5000", headers=headers) as client:
            body = {"query": ["w3 w5 w6"], "prompts": ["w3"]}
            return float(client.post(PATH, json=body).json()["rewards"][0])

    assert rounded(served("float32"), served("bfloat16"))


def test_a_function_has_no_number_format():
    with pytest.raises(ValidationError):
        RewardSource(function="quality.py:f", dtype="bfloat16")
    with pytest.raises(ConfigError) as refused:
        parse(ServeRewardConfig, {"function": "quality.py:f", "dtype": "bfloat16"})
    assert "dtype" in str(refused.value)
