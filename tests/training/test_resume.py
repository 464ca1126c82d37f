"""A run that is killed and resumed is the run that was left alone, bit for bit."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from keel.errors import ConfigError
from keel.training.trainer import PolicyTrainer

from ..runs import PROMPTS, contents, lines, train, without_clock

EVERYTHING = {"algorithm.target_kl": 1.0, "algorithm.kl_horizon": 100.0, "reward.normalize": "running"}
RUNS: dict[str, dict[str, Any]] = {
    "ppo": {"algorithm.update_epochs": 2, "optim.schedule": "linear", **EVERYTHING},
    "shared critic": {"critic.sharing": "shared", **EVERYTHING},
    "rloo": {"algorithm.name": "rloo", "reward.normalize": "reference", "reward.segments": "w3"},
    "resampling": {
        "algorithm.name": "grpo",
        "rollout.group_size": 2,
        "rollout.resample_rounds": 3,
        "algorithm.kl_coef": 0.0,
    },
    "nf4": {"policy.lora": {"r": 4}, "policy.quantization": "nf4", "optim.learning_rate": 1e-2},
    "int8": {"policy.lora": {"r": 4}, "policy.quantization": "int8", "policy.dtype": "bfloat16"},
    "lora": {"policy.lora": {"r": 4}, "critic.warmup_steps": 1, "optim.learning_rate": 1e-2},
}


class Killed(BaseException):
    """Like a signal: nothing of keel catches it."""


def train_until_killed(
    model: Path, output: Path, changes: dict[str, Any], step: int, prompts: Sequence[Any] | None = PROMPTS
) -> None:
    def dying_sample(trainer: PolicyTrainer) -> Any:
        if trainer.state.step + 1 == step:
            raise Killed
        return sample(trainer)

    sample = PolicyTrainer.sample
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PolicyTrainer, "sample", dying_sample)
        with pytest.raises(Killed):
            train(model, output, changes, prompts=prompts)


@pytest.mark.parametrize("name", list(RUNS))
def test_a_resumed_run_is_the_straight_run(name: str, tiny_policy: Path, tmp_path: Path) -> None:
    changes = {"steps": 4, "checkpoint.every": 2, "log.rollouts_per_step": 16, **RUNS[name]}
    if "policy.quantization" in changes:
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install '.[quantization]'")
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    expected = train(tiny_policy, straight, changes)
    train_until_killed(tiny_policy, resumed, changes, step=4)
    assert [line["step"] for line in lines(resumed / "metrics.jsonl")] == [1, 2, 3]  # the third is not in a checkpoint
    found = train(tiny_policy, resumed, changes, resume=True)
    assert without_clock(found) == without_clock(expected)
    files = contents(straight)
    assert {"checkpoints/step-000004/weights.safetensors", "policy/model.safetensors", "rollouts.jsonl"} < set(files)
    assert contents(resumed) == files
    assert expected[0]["objective/kl_coef"] == expected[1]["objective/kl_coef"] or "algorithm.target_kl" in changes


def test_killed_before_the_first_checkpoint_it_starts_again(
    tiny_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"steps": 2, "checkpoint.every": 2, "reward.normalize": "reference"}
    expected = train(tiny_policy, tmp_path / "straight", changes)
    train_until_killed(tiny_policy, tmp_path / "resumed", changes, step=2)
    assert without_clock(train(tiny_policy, tmp_path / "resumed", changes, resume=True)) == without_clock(expected)
    assert "no checkpoint in" in capsys.readouterr().err


def test_a_finished_run_without_its_checkpoints_is_not_begun_again(tiny_policy: Path, tmp_path: Path) -> None:
    train(tiny_policy, tmp_path, {"steps": 1})
    shutil.rmtree(tmp_path / "checkpoints")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="has no checkpoints"):
        train(tiny_policy, tmp_path, {"steps": 2}, resume=True)
    assert contents(tmp_path) == before


def test_what_the_logs_lost_is_reported_on_resume(
    tiny_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each step that is still there stands in the logs once, and the run goes on."""
    train(tiny_policy, tmp_path, {"steps": 3})
    metrics, rollouts = tmp_path / "metrics.jsonl", tmp_path / "rollouts.jsonl"
    first, _second, third = metrics.read_text().splitlines(keepends=True)
    metrics.write_text(first + third + third)
    rows = rollouts.read_text().splitlines(keepends=True)
    assert len(rows) == 12
    rollouts.write_text("".join(rows[:1] + rows[4:]))
    capsys.readouterr()
    train(tiny_policy, tmp_path, {"steps": 4}, resume=True)
    printed = capsys.readouterr().err
    assert "metrics.jsonl: lines of step 2 are missing" in printed
    assert "metrics.jsonl: lines of step 3 occur more than once" in printed
    assert "rollouts.jsonl: lines of step 1 are missing" in printed
    assert [line["step"] for line in lines(metrics)] == [1, 3, 4]
    assert [line["step"] for line in lines(rollouts)] == [1] + [2] * 4 + [3] * 4 + [4] * 4


def test_a_finished_run_may_go_on(tiny_policy: Path, tmp_path: Path) -> None:
    """With a constant learning rate, four steps are two and two more."""
    expected = train(tiny_policy, tmp_path / "straight", {"steps": 4})
    train(tiny_policy, tmp_path / "resumed", {"steps": 2})
    found = train(tiny_policy, tmp_path / "resumed", {"steps": 4}, resume=True)
    assert without_clock(found) == without_clock(expected)


def test_other_settings_are_another_run(tiny_policy: Path, tmp_path: Path) -> None:
    train(tiny_policy, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"cannot resume with other settings: algorithm.kl_coef was 0.05, is 0.5"):
        train(tiny_policy, tmp_path / "run", {"algorithm.kl_coef": 0.5, "steps": 3}, resume=True)


def test_only_the_last_checkpoint_has_a_model_folder(tiny_policy: Path, tmp_path: Path) -> None:
    train(tiny_policy, tmp_path, {"steps": 3, "checkpoint.every": 1, "checkpoint.keep": 0, "checkpoint.models": "last"})
    with_model = {path.parent.name for path in tmp_path.glob("checkpoints/step-*/policy")}
    assert with_model == {"step-000003"}
    assert len(list(tmp_path.glob("checkpoints/step-*/weights.safetensors"))) == 3
