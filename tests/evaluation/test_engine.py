"""`keel sample` and `keel evaluate` with vLLM."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keel.config import EvaluateConfig, SampleConfig, parse
from keel.errors import ConfigError, KeelError
from keel.evaluation.evaluate import evaluate_policies
from keel.evaluation.sample import sample_responses

from ..rollout.vllm_stub import ThreadServer
from ..runs import PROMPTS, share_of_w3


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("keel.rollout.vllm.engine.Server", ThreadServer)
    monkeypatch.setattr(ThreadServer, "faults", set())
    yield
    assert all(server.is_closed for server in ThreadServer.instances)
    ThreadServer.instances.clear()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return path


def sampled(model: Path, prompts: Path, tmp_path: Path, **sampling: Any) -> list[list[str]]:
    output = tmp_path / "responses.jsonl"
    values = {"model": str(model), "prompts": {"path": str(prompts)}, "output": str(output), "engine": "vllm"}
    sample_responses(parse(SampleConfig, values | {"sampling": {"num_responses": 3} | sampling}))
    return [json.loads(line)["responses"] for line in output.read_text().splitlines()]


def test_responses_do_not_depend_on_the_batch(tiny_policy: Path, prompts: Path, tmp_path: Path) -> None:
    together = sampled(tiny_policy, prompts, tmp_path)
    assert [len(responses) for responses in together] == [3] * 4
    assert len({text for responses in together for text in responses}) > 6
    assert sampled(tiny_policy, prompts, tmp_path, batch_size=2) == together
    assert len(ThreadServer.instances) == 2


def test_greedy_responses_are_those_of_keel(tiny_policy: Path, prompts: Path, tmp_path: Path) -> None:
    by_vllm = sampled(tiny_policy, prompts, tmp_path, temperature=0.0)
    values = {"model": str(tiny_policy), "prompts": {"path": str(prompts)}, "output": str(tmp_path / "keel.jsonl")}
    sample_responses(parse(SampleConfig, values | {"sampling": {"num_responses": 3, "temperature": 0.0}}))
    rows = (tmp_path / "keel.jsonl").read_text().splitlines()
    assert by_vllm == [json.loads(line)["responses"] for line in rows]


def test_evaluate_and_best_of_by_the_engine(tiny_policy: Path, prompts: Path) -> None:
    values = {
        "policy": str(tiny_policy),
        "against": str(tiny_policy),
        "prompts": {"path": str(prompts)},
        "sampling": {"num_responses": 4, "max_response_tokens": 8, "top_k": 5},
        "best_of": 4,
    }
    by_vllm = evaluate_policies(parse(EvaluateConfig, values | {"engine": "vllm"}), [share_of_w3])
    by_keel = evaluate_policies(parse(EvaluateConfig, values), [share_of_w3])
    assert len(ThreadServer.instances) == 2
    assert by_vllm.keys() == by_keel.keys()
    assert by_vllm["policy"].keys() == by_keel["policy"].keys()
    assert by_vllm["policy"]["kl"] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("fault", ["hot", "other_server", "short"])
def test_an_engine_that_lies_is_found(
    fault: str, tiny_policy: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ThreadServer, "faults", {fault})
    with pytest.raises(KeelError, match=r"disagree|another server|cut a response"):
        sampled(tiny_policy, prompts, tmp_path)
    assert not (tmp_path / "responses.jsonl").exists()


def test_what_it_cannot_do_is_refused(tiny_policy: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        sampled(tiny_policy, prompts, tmp_path, stop=["w1 w2"])
    assert caught.value.where == "engine"
    values = {"model": "m", "prompts": {"path": "p"}, "vllm": {"memory": 0.5}}
    with pytest.raises(ConfigError, match="engine: vllm"):
        parse(SampleConfig, values)
    with pytest.raises(ConfigError, match="engine: vllm"):
        parse(EvaluateConfig, {"policy": "m", "prompts": {"path": "p"}, "vllm": {"memory": 0.5}})
