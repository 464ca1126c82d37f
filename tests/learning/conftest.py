"""The base run, and models to go with it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ..runs import train
from .runner import Metrics, Runner


@pytest.fixture(scope="module")
def base(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Metrics:
    """Two steps of 16 answers; four minibatches each."""
    return train(tiny_policy, tmp_path_factory.mktemp("base") / "run")


@pytest.fixture(scope="module")
def other_model(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny policy after a change that its reader notices."""
    folder = tmp_path_factory.mktemp("other")
    model = AutoModelForCausalLM.from_pretrained(tiny_policy)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_policy).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward_model(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier on the tiny policy's trunk that says something from the start."""
    folder = tmp_path_factory.mktemp("reward")
    model = AutoModelForSequenceClassification.from_pretrained(tiny_policy, num_labels=1)
    with torch.no_grad():
        model.score.weight.copy_(torch.linspace(-1, 1, 32).unsqueeze(0))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_policy).save_pretrained(folder)
    return folder


@pytest.fixture
def run(tiny_policy: Path, tmp_path: Path) -> Runner:
    return Runner(tiny_policy, tmp_path / "run")
