"""`keel plan` adds the memory of vLLM."""

from pathlib import Path
from typing import Any

import pytest

from keel.config import PlanConfig, parse
from keel.errors import ConfigError
from keel.training.plan import check_devices, possible_changes
from keel.training.plan_engine import engine_bytes, with_engine

from ..runs import settings

PEAKS = {"start": 1e9, "sample": 2e9, "update": 5e9}


def config_of(model: Path, **vllm: Any) -> PlanConfig:
    return parse(PlanConfig, settings(model, Path("unused"), {"rollout.engine": "vllm", "rollout.vllm": vllm}))


def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)


def test_on_a_cpu_it_is_there_in_all_phases(tiny_policy: Path) -> None:
    """2.1 GB of programs, 1.1 GB of cache, and the weights three times."""
    config = config_of(tiny_policy)
    size = engine_bytes(config, 32e9)
    assert size == pytest.approx(3.2e9, rel=1e-3)
    assert size > 3.2e9
    assert with_engine(PEAKS, config, 32e9) == {phase: peak + size for phase, peak in PEAKS.items()}
    half = config_of(tiny_policy, dtype="bfloat16")
    assert engine_bytes(half, 32e9) - 3.2e9 == pytest.approx((size - 3.2e9) / 2)


def test_on_a_gpu_it_has_its_share_while_it_is_awake(tiny_policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch)
    asleep = with_engine(PEAKS, config_of(tiny_policy, memory=0.25), 80e9)
    assert asleep == {"start": 21e9, "sample": 22e9, "update": 5e9}
    awake = with_engine(PEAKS, config_of(tiny_policy, memory=0.25, sleep=False), 80e9)
    assert awake == {"start": 21e9, "sample": 22e9, "update": 25e9}
    assert with_engine(PEAKS, config_of(tiny_policy, devices="1"), 80e9) == PEAKS


def test_keels_sampler_takes_nothing_and_saves_the_memory(tiny_policy: Path) -> None:
    config = parse(PlanConfig, settings(tiny_policy, Path("unused")))
    assert with_engine(PEAKS, config, 32e9) == PEAKS
    assert possible_changes(config_of(tiny_policy))[0] == ("rollout", {"engine": "keel", "vllm": {}})


def test_several_devices_are_refused(tiny_policy: Path) -> None:
    config = config_of(tiny_policy).model_copy(update={"devices": 2})
    with pytest.raises(ConfigError) as caught:
        check_devices(config)
    assert caught.value.where == "rollout.engine"
