"""`rollout.correction_cap`: the weights of the policy loss where the sampler's log-probs differ from the trainer's."""

from pathlib import Path
from typing import Any

import pytest

from keel.config import TrainConfig, parse
from keel.errors import ConfigError
from keel.training import trainer

from ..runs import contents, settings, train

KEYS = ("sampler/correction", "sampler/corrections_capped")


def measured(model: Path, output: Path, **changes: Any) -> list[tuple[float, ...]]:
    given = {name.replace("__", "."): value for name, value in changes.items()}
    return [tuple(line[key] for key in KEYS) for line in train(model, output, given)]


def test_float32_has_no_correction(tiny_policy: Path, tmp_path: Path) -> None:
    assert measured(tiny_policy, tmp_path / "capped") == [(1.0, 0.0)] * 2
    assert measured(tiny_policy, tmp_path / "off", rollout__correction_cap=None) == [(1.0, 0.0)] * 2
    assert contents(tmp_path / "capped") == contents(tmp_path / "off")


def test_bfloat16_is_corrected(tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "CLOSE", 0.0)  # as if the sampler were further from the trainer
    (correction, capped), _ = measured(tiny_policy, tmp_path / "capped", policy__dtype="bfloat16")
    assert correction != 1.0
    assert correction == pytest.approx(1.0, abs=0.05)
    assert capped == 0.0
    (correction, capped), _ = measured(
        tiny_policy, tmp_path / "low", policy__dtype="bfloat16", rollout__correction_cap=1.0
    )
    assert correction < 1.0
    assert capped > 0.05
    off = measured(tiny_policy, tmp_path / "off", policy__dtype="bfloat16", rollout__correction_cap=None)
    assert off == [(1.0, 0.0)] * 2
    assert contents(tmp_path / "capped") != contents(tmp_path / "off")


def test_a_ratio_corrects_for_a_close_sampler(tiny_policy: Path, tmp_path: Path) -> None:
    """The sampler's log-probs are then those of the old policy. Without a ratio in the loss they never are."""
    assert measured(tiny_policy, tmp_path / "ppo", policy__dtype="bfloat16") == [(1.0, 0.0)] * 2
    (correction, _), _ = measured(tiny_policy, tmp_path / "a2c", policy__dtype="bfloat16", algorithm__name="a2c")
    assert correction != 1.0


def test_a_cap_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.correction_cap"):
        parse(TrainConfig, settings(tmp_path, tmp_path, {"rollout.correction_cap": 0.5}))
