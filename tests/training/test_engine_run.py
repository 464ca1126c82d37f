"""Training runs whose responses an engine samples: exact on resume, and ended where the engine cannot be trusted."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from keel.config import TrainConfig, parse
from keel.errors import ConfigError, EngineError
from keel.training.engine_setup import build_engine
from keel.training.policy import train_policy
from keel.world import ALONE, World

from ..rollout.vllm_stub import ThreadServer
from ..runs import PROMPTS, contents, lines, settings, share_of_w3, train, without_clock
from .test_engine_check import VLLM

RUN = VLLM | {"steps": 4, "checkpoint.every": 2, "rollout.batch_size": 8}
BFLOAT16 = RUN | {"policy.dtype": "bfloat16"}


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("keel.rollout.vllm.engine.Server", ThreadServer)
    monkeypatch.setattr(ThreadServer, "faults", set())
    yield
    assert all(server.is_closed for server in ThreadServer.instances)
    ThreadServer.instances.clear()


def with_faults_from(step: int, *faults: str) -> Callable[..., list[float]]:
    """A reward function after whose `step`-th step the engine has these faults."""

    def share(completions: list[str], trainer_state: Any = None, **_: Any) -> list[float]:
        if trainer_state is not None and len(completions) == 8 and trainer_state.global_step + 1 == step:
            ThreadServer.faults = set(faults)
        return share_of_w3(completions)

    return share


def weights(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_run_repeats_to_the_bit(algorithm: str, tiny_policy: Path, tmp_path: Path) -> None:
    changes = RUN | {"algorithm.name": algorithm}
    first = train(tiny_policy, tmp_path / "first", changes)
    assert [line["step"] for line in first] == [1, 2, 3, 4]
    assert all(line["sampler/approx_kl"] < 1e-7 and line["sampler/correction"] == 1.0 for line in first)
    assert without_clock(train(tiny_policy, tmp_path / "second", changes)) == without_clock(first)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert not (tmp_path / "first" / "responses").exists()


@pytest.mark.parametrize("fault", ["other_server", "refuse", "nan", "short"])
def test_f50_a_fault_in_a_step_ends_the_run_and_a_resumed_run_is_exact(
    fault: str, tiny_policy: Path, tmp_path: Path
) -> None:
    """Also although the last bits of the engine's log-probs differ from sampling to sampling."""
    train(tiny_policy, tmp_path / "straight", RUN)
    with pytest.raises(EngineError) as caught:
        train(tiny_policy, tmp_path / "run", RUN, [with_faults_from(2, fault)])
    assert caught.value.exit_code == 75
    assert "--resume" in str(caught.value) or fault in ("nan", "short")
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 2
    ThreadServer.faults = {"jitter"}
    train(tiny_policy, tmp_path / "run", RUN, [with_faults_from(99)], resume=True)
    assert weights(tmp_path / "run") == weights(tmp_path / "straight")


def test_rounds_of_resampling_are_recalled_on_resume(tiny_policy: Path, tmp_path: Path) -> None:
    """The engine's log-probs differ in their last bits from sampling to sampling; recorded ones do not."""
    changes = RUN | {"algorithm.name": "grpo", "rollout.group_size": 2, "rollout.resample_rounds": 2}

    def has_w3(completions: list[str], trainer_state: Any = None, **_: Any) -> list[float]:
        if trainer_state is not None and len(completions) == 8 and trainer_state.global_step == fault_step:
            raise KeyboardInterrupt
        return [float("w3" in text.split()) for text in completions]

    fault_step, fault_at = 99, 3
    straight = train(tiny_policy, tmp_path / "straight", changes, [has_w3])
    assert max(line["resample/rounds"] for line in straight) == 2.0
    fault_step = fault_at
    with pytest.raises(KeyboardInterrupt):
        train(tiny_policy, tmp_path / "run", changes, [has_w3])
    names = [path.name for path in sorted((tmp_path / "run" / "responses").iterdir())]
    assert names[0] == "step-000003-01.safetensors" or names[0] == "step-000003.safetensors"
    assert "step-000003-01.safetensors" in names
    fault_step = 99
    ThreadServer.faults = {"jitter"}
    train(tiny_policy, tmp_path / "run", changes, [has_w3], resume=True)
    assert weights(tmp_path / "run") == weights(tmp_path / "straight")
    assert not (tmp_path / "run" / "responses").exists()


def test_f51_stale_weights_in_float32_end_the_run_in_the_step(tiny_policy: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="differ from the policy's"):
        train(tiny_policy, tmp_path / "run", RUN, [with_faults_from(2, "stale")])
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 2


def test_f51_stale_weights_in_bfloat16_end_the_run_after_two_steps(tiny_policy: Path, tmp_path: Path) -> None:
    """The learning rate moves the policy by more than rounding does; the correction does not hide it."""
    changes = BFLOAT16 | {"steps": 8, "optim": {"learning_rate": 0.05, "schedule": "constant"}}
    with pytest.raises(EngineError, match=r"above 0\.15"):
        train(tiny_policy, tmp_path / "run", changes, [with_faults_from(1, "stale")])
    steps = lines(tmp_path / "run" / "metrics.jsonl")
    assert 2 <= len(steps) <= 4
    assert steps[-1]["sampler/approx_kl"] > 0.02


def test_f52_bfloat16_repeats_recorded_responses(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine draws anew at every call, as bfloat16 may; steps that a killed run recorded are the same again."""
    monkeypatch.setattr("keel.training.engine_check.same_tokens", lambda *_: True)
    ThreadServer.faults = {"seedless"}

    def dies_in_step_4(completions: list[str], trainer_state: Any = None, **_: Any) -> list[float]:
        if trainer_state is not None and len(completions) == 8 and trainer_state.global_step == 3:
            raise KeyboardInterrupt
        return share_of_w3(completions)

    dies_in_step_4.__name__ = "share_of_w3"
    with pytest.raises(KeyboardInterrupt):
        train(tiny_policy, tmp_path / "run", BFLOAT16 | {"checkpoint.every": 2}, [dies_in_step_4])
    recorded = lines(tmp_path / "run" / "metrics.jsonl")
    names = [path.name for path in sorted((tmp_path / "run" / "responses").iterdir())]
    assert names == ["step-000003.safetensors", "step-000004.safetensors"]
    resumed = train(tiny_policy, tmp_path / "run", BFLOAT16, resume=True)
    assert without_clock(resumed[:3]) == without_clock(recorded)
    assert resumed[2]["time/sample_seconds"] == 0.0
    assert resumed[2]["sampler/correction"] != 1.0
    assert not (tmp_path / "run" / "responses").exists()


def test_responses_of_another_start_are_not_recalled(tiny_policy: Path, tmp_path: Path) -> None:
    train(tiny_policy, tmp_path / "straight", RUN)
    journal = tmp_path / "run" / "responses"
    journal.mkdir(parents=True)
    (journal / "step-000001.safetensors").write_bytes(b"no tensors")
    train(tiny_policy, tmp_path / "run", RUN)
    assert contents(tmp_path / "run") == contents(tmp_path / "straight")


def test_the_check_alone_leaves_no_server(tiny_policy: Path, tmp_path: Path) -> None:
    measured = train_policy(settings(tiny_policy, tmp_path / "run", RUN), [share_of_w3], PROMPTS, check_only=True)
    assert measured["check/engine_gap"] < 1e-4


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"rollout.stop": ["w1 w2"]}, "rollout.engine"),
        ({"policy.quantization": "nf4", "policy.lora": {"r": 2}}, "rollout.engine"),
    ],
)
def test_what_vllm_cannot_do_exactly_is_refused(
    changes: dict[str, Any], where: str, tiny_policy: Path, tmp_path: Path
) -> None:
    config = parse(TrainConfig, settings(tiny_policy, tmp_path, RUN | changes))
    with pytest.raises(ConfigError) as caught:
        build_engine(config, None, tuple(config.rollout.stop), [], ALONE)  # type: ignore[arg-type]
    assert caught.value.where == where
    assert caught.value.fix


def test_several_processes_are_refused(tiny_policy: Path, tmp_path: Path) -> None:
    config = parse(TrainConfig, settings(tiny_policy, tmp_path, RUN))
    with pytest.raises(ConfigError, match="one process"):
        build_engine(config, None, (), [], World(0, 2, ALONE.device))  # type: ignore[arg-type]


def test_settings_of_vllm_need_the_engine(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.engine"):
        parse(TrainConfig, settings(tmp_path, tmp_path, {"rollout.vllm": {"memory": 0.5}}))
