"""A real vLLM, where KEEL_VLLM_PYTHON names the interpreter that has it (`make test-vllm`)."""

import os
from pathlib import Path
from typing import Any

import pytest

from keel.config import TrainConfig, parse
from keel.errors import ConfigError
from keel.training.engine_check import check_engine
from keel.training.setup import build_training_setup
from keel.world import ALONE

from ..conftest import word_tokenizer
from ..runs import contents, settings, share_of_w3, train, without_clock
from .test_vllm_process import processes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("KEEL_VLLM_PYTHON" not in os.environ, reason="needs vLLM: set KEEL_VLLM_PYTHON (make vllm)"),
]
PROMPTS = ["w1 w2", "w5", "w6 w7 w8", " ".join(f"w{i % 28}" for i in range(160))]  # the last fills a block of the cache


def llama(folder: Path, tied: bool, head: int = 32) -> Path:
    """A random model with the smallest head size that vLLM knows on a CPU."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=4 * head,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer("<pad>").save_pretrained(folder)
    return folder


def changes(**others: Any) -> dict[str, Any]:
    vllm = {"python": os.environ["KEEL_VLLM_PYTHON"]}
    return {"rollout.engine": "vllm", "rollout.vllm": vllm, "steps": 3, "checkpoint.every": 2} | others


@pytest.mark.parametrize("tied", [False, True])
def test_it_follows(tied: bool, tmp_path: Path) -> None:
    """Also with tied embeddings, whose output matrix vLLM does not replace on a CPU."""
    config = parse(TrainConfig, settings(llama(tmp_path / "model", tied), tmp_path / "run", changes()))
    setup = build_training_setup(config, [share_of_w3], PROMPTS, ALONE)
    try:
        measured = check_engine(setup)
    finally:
        setup.engine.close()
    assert measured["check/engine_gap"] < 1e-4
    assert measured["check/engine_change"] >= 0.5


def test_a_run_that_is_killed_resumes_to_the_bit(tmp_path: Path) -> None:
    model = llama(tmp_path / "model", tied=False)
    straight = train(model, tmp_path / "straight", changes(), prompts=PROMPTS)
    calls = []

    def dies(completions: list[str], trainer_state: Any = None, **_: Any) -> list[float]:
        calls.append(trainer_state.global_step)
        if trainer_state.global_step == 2:
            raise KeyboardInterrupt
        return share_of_w3(completions)

    dies.__name__ = "share_of_w3"
    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path / "run", changes(), [dies], PROMPTS)
    resumed = train(model, tmp_path / "run", changes(), prompts=PROMPTS, resume=True)
    for name, content in contents(tmp_path / "straight").items():
        if name.endswith(".safetensors"):
            assert contents(tmp_path / "run")[name] == content, name
    scores = [line["objective/scores"] for line in straight]
    assert [line["objective/scores"] for line in resumed] == scores
    assert len(without_clock(resumed)) == 3


def test_bfloat16(tmp_path: Path) -> None:
    model = llama(tmp_path / "model", tied=False)
    steps = train(model, tmp_path / "run", changes(**{"policy.dtype": "bfloat16"}), prompts=PROMPTS)
    assert all(line["sampler/correction"] == pytest.approx(1.0, abs=0.02) for line in steps)
    assert any(line["sampler/correction"] != 1.0 for line in steps)


def test_a_head_size_that_it_does_not_know(tmp_path: Path) -> None:
    config = parse(TrainConfig, settings(llama(tmp_path / "model", False, head=8), tmp_path / "run", changes()))
    setup = build_training_setup(config, [share_of_w3], PROMPTS, ALONE)
    with pytest.raises(ConfigError) as caught:
        check_engine(setup)
    assert "rollout.engine: keel" in caught.value.fix
    folder = setup.engine._server.folder.path if setup.engine._server else Path("none")  # type: ignore[attr-defined]
    setup.engine.close()
    assert processes(folder) == []
