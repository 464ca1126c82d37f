"""An engine outside the trainer: each lie is found before the first step, with the cause."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from keel.config import TrainConfig, parse
from keel.errors import ConfigError, EngineError
from keel.training.engine_check import AgreementWatch, check_engine
from keel.training.setup import TrainingSetup, build_training_setup
from keel.world import ALONE

from ..learn.tables import batch_of, rollouts
from ..rollout.vllm_stub import ThreadServer
from ..runs import PROMPTS, settings, share_of_w3

VLLM = {"rollout.engine": "vllm", "rollout.vllm": {"timeout_seconds": 20}}


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("keel.rollout.vllm.engine.Server", ThreadServer)
    monkeypatch.setattr(ThreadServer, "faults", set())
    yield
    for server in ThreadServer.instances:
        server.close()
    ThreadServer.instances.clear()


def setup_of(model: Path, tmp_path: Path, changes: dict[str, Any] | None = None) -> TrainingSetup:
    values = settings(model, tmp_path / "run", VLLM | (changes or {}))
    return build_training_setup(parse(TrainConfig, values), [share_of_w3], PROMPTS, ALONE)


@pytest.mark.parametrize("model", ["tiny_policy", "tiny_gpt2"])
def test_an_engine_that_follows_passes(model: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    measured = check_engine(setup_of(request.getfixturevalue(model), tmp_path))
    assert measured["check/engine_gap"] < 1e-4
    assert measured["check/engine_change"] >= 0.5
    (server,) = ThreadServer.instances
    assert server.weights.updates == 3
    one = ["pause", "collective_rpc", "update_weight_version", "reset_prefix_cache", "resume"]
    assert server.weights.log == one * 3


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("stale", "still has the previous weights"),
        ("stale_second", "still has the previous weights"),
        ("half", "some of its weights"),
        ("head", "output matrix"),
        ("prefix_cache", "prefix cache"),
        ("top_k", "sampling settings"),
        ("hot", "sampling settings"),
        ("short", "cut a response at 3 of 6 tokens"),
        ("wrong_end", "finish reason"),
        ("other_server", "another server"),
        ("nan", "not finite"),
        ("null_logprob", "not finite"),
        ("no_logprob", "no log-probability for some token"),
        ("no_tokens", "no tokens"),
        ("beyond", "a token that is not below 32"),
        ("cut_prompt", "another prompt"),
        ("seedless", "more than weights and seeds"),
        ("cache_held", "did not drop"),
        ("refuse", "HTTP 500"),
        ("no_json", "not JSON"),
    ],
)
def test_each_lie_is_found(fault: str, cause: str, tiny_policy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(ThreadServer, "faults", {fault})
    with pytest.raises(ConfigError, match=cause) as caught:
        check_engine(setup_of(tiny_policy, tmp_path))
    assert "rollout.engine: keel" in caught.value.fix


def test_an_update_that_fails_once_is_sent_again(tiny_policy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(ThreadServer, "faults", {"refuse_once"})
    check_engine(setup_of(tiny_policy, tmp_path))
    (server,) = ThreadServer.instances
    assert server.weights.updates == 4


def test_an_engine_that_hangs_ends_at_the_deadline(tiny_policy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(ThreadServer, "faults", {"hang"})
    with pytest.raises(ConfigError, match="did not reply within 1 s"):
        check_engine(setup_of(tiny_policy, tmp_path, {"rollout.vllm": {"timeout_seconds": 1}}))


def test_an_engine_that_shares_a_gpu_sleeps_between_batches(tiny_policy: Path, tmp_path: Path) -> None:
    """The weights get their memory before they are loaded, the cache only after that."""
    setup = setup_of(tiny_policy, tmp_path)
    setup.engine.settings = replace(setup.engine.settings, sleeps=True)  # type: ignore[attr-defined]
    check_engine(setup)
    (server,) = ThreadServer.instances
    load = ["pause", "collective_rpc", "update_weight_version", "reset_prefix_cache"]
    awake = ["wake_up?tags=weights", *load, "wake_up?tags=kv_cache", "resume", "sleep?level=2"]
    assert server.weights.log == [*load, "resume", "sleep?level=2", *awake, *awake]


def test_a_batch_without_counted_tokens_tells_nothing(tiny_policy: Path, tmp_path: Path) -> None:
    watch = AgreementWatch(parse(TrainConfig, settings(tiny_policy, tmp_path, VLLM)))
    answers = rollouts([[1, 2]])
    batch = batch_of([[1, 2]], [[-1.0, -2.0]], [[0.0, 0.0]])
    watch.check(answers, replace(batch, response_mask=torch.zeros(1, 2, dtype=torch.bool)))
    with pytest.raises(EngineError, match=r"1\.5 on average"):
        watch.check(answers, batch)


def test_a_server_without_its_engine_process_is_noticed_before_the_deadline(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its requests hang, and it reports that it is not healthy."""
    setup = setup_of(tiny_policy, tmp_path)
    check_engine(setup)
    monkeypatch.setattr(ThreadServer, "faults", {"hang", "sick"})
    start = time.monotonic()
    with pytest.raises(ConfigError, match="not healthy"):
        check_engine(setup)
    assert time.monotonic() - start < 15
