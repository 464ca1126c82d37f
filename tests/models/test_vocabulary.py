"""Ids beyond the embeddings: said at loading, refused by name in rows, and never needed for padding."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from keel.config import DpoConfig, EvaluateConfig, RewardConfig, SampleConfig, SftConfig, TrainConfig, parse
from keel.errors import ConfigError, DataError, KeelError
from keel.evaluation.evaluate import evaluate_policies
from keel.evaluation.sample import sample_responses
from keel.models.loading import load_classifier
from keel.models.reward_model import RewardModel
from keel.supervised.dpo import dpo
from keel.supervised.reward import reward
from keel.supervised.sft import sft
from keel.training.policy import train_policy

from ..runs import settings, share_of_w3

ROWS = [
    {"prompt": f"w{i} <new1>", "completion": " w1 <new1>", "chosen": " w1 <new1>", "rejected": " w2"} for i in range(4)
]


def with_tokens(folder: Path, target: Path, add: Callable[[Any], Any]) -> Path:
    """The same model under a tokenizer of more tokens."""
    shutil.copytree(folder, target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    add(tokenizer)
    tokenizer.save_pretrained(target)
    return target


@pytest.fixture
def larger(tiny_policy: Path, tmp_path: Path) -> Path:
    """Ids up to 35 above 32 embeddings: <new1> is 33."""
    return with_tokens(tiny_policy, tmp_path / "larger", lambda t: t.add_tokens([f"<new{i}>" for i in range(4)]))


def written(path: Path, rows: list[dict[str, Any]] = ROWS) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def verbs(model: Path, folder: Path) -> dict[str, Callable[[], Any]]:
    data = {"data": {"path": written(folder / "rows.jsonl")}, "model": str(model), "output": str(folder / "run")}
    prompts = {"prompts": {"path": data["data"]["path"]}}
    return {
        "sft": lambda: sft(parse(SftConfig, data)),
        "dpo": lambda: dpo(parse(DpoConfig, data)),
        "reward": lambda: reward(parse(RewardConfig, data)),
        "train": lambda: train_policy(
            parse(TrainConfig, settings(model, folder / "run", {"prompts.path": prompts["prompts"]["path"]})),
            [share_of_w3],
        ),
        "sample": lambda: sample_responses(
            parse(SampleConfig, {"model": str(model), "output": str(folder / "s.jsonl"), **prompts})
        ),
        "evaluate": lambda: evaluate_policies(parse(EvaluateConfig, {"policy": str(model), **prompts}), [share_of_w3]),
    }


@pytest.mark.parametrize("verb", ["sft", "dpo", "reward", "train", "sample", "evaluate"])
def test_a_row_with_such_a_token_is_refused_by_name(
    verb: str, larger: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match=r"'<new1>' has id 33, but the model has 32 embeddings"):
        verbs(larger, tmp_path)[verb]()
    assert f"{larger}: the tokenizer has ids up to 35, but the model has 32 embeddings" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["tiny_policy", "tiny_gpt2"])
@pytest.mark.parametrize("sharing", ["separate", "shared"])
def test_padding_needs_no_embedding(
    kind: str, sharing: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def pad(tokenizer: Any) -> None:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})

    model = with_tokens(request.getfixturevalue(kind), tmp_path / "model", pad)
    config = parse(TrainConfig, settings(model, tmp_path / "run", {"steps": 1, "critic.sharing": sharing}))
    train_policy(config, [share_of_w3], ["w1 w2 w3", "w4"])
    assert "embeddings" not in capsys.readouterr().err
    assert load_classifier(str(tmp_path / "run" / "critic")).config.pad_token_id == 32
    prompts = {"path": written(tmp_path / "p.jsonl", [{"prompt": "w1 w2 w3"}, {"prompt": "w4"}])}
    sample_responses(
        parse(SampleConfig, {"model": str(model), "prompts": prompts, "output": str(tmp_path / "s.jsonl")})
    )


def test_an_end_token_that_cannot_be_sampled_is_refused(tiny_policy: Path, tmp_path: Path) -> None:
    def end(tokenizer: Any) -> None:
        tokenizer.add_special_tokens({"eos_token": "<|end|>"})

    model = with_tokens(tiny_policy, tmp_path / "model", end)
    file = model / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 32}))
    with pytest.raises(ConfigError, match="eos_token_id is 32") as refused:
        verbs(model, tmp_path)["train"]()
    assert refused.value.where == str(file)


def test_a_scorer_refuses_a_text_that_it_has_no_embedding_for(larger: Path, tmp_path: Path) -> None:
    model = RewardModel.load(str(larger), template="{prompt} {response}")
    torch.nn.init.normal_(model.head.weight)
    with pytest.raises(KeelError, match=r"<new1>"):
        model.score(["w1"], ["<new1>"])
    assert model.score(["w1"], ["w2"]).isfinite().all()
