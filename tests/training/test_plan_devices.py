"""Memory and traffic of divided weights, against numbers computed by hand; and the plan of several devices."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from keel.cli import plan as command
from keel.config import PlanConfig, parse
from keel.errors import ConfigError
from keel.training import plan as plans
from keel.training.plan_devices import (
    ModelSize,
    bytes_in_flight,
    checkpoint_bytes,
    divided_bytes,
    divided_memory,
    gathered_bytes,
    loading_bytes,
    moved_bytes,
    undivided_bytes,
)
from keel.training.plan_sizes import count_weights
from keel.training.probe import Cost

from ..runs import settings

FLOAT32 = ModelSize(
    layers=800, layer=100, outside=200, trained=1000, trained_layer=100, trained_outside=200, itemsize=4
)
BFLOAT16 = replace(FLOAT32, itemsize=2)
LORA = replace(BFLOAT16, trained=40, trained_layer=5, trained_outside=0)
FROZEN = replace(FLOAT32, trained=0, trained_layer=0, trained_outside=0)
CRITIC = replace(FLOAT32, outside=100, trained=900, trained_outside=100)
RUN = {"policy": FLOAT32, "critic": CRITIC, "reference": FROZEN}

PEAKS = {"start": 10e6, "sample": 20e6, "score": 1e6, "targets": 20e6, "update": 30e6}
SECONDS = {"start": 9.0, "sample": 1.0, "score": 0.5, "targets": 0.5, "update": 2.0}


@pytest.mark.parametrize(
    ("size", "phase", "undivided", "divided"),
    [
        (FLOAT32, "start", 4000, 1000),
        (FLOAT32, "sample", 12_000, 3000),
        (FLOAT32, "update", 12_000, 3000),
        (BFLOAT16, "update", 14_000, 3000),  # the 16-bit weights are there only while they are gathered
        (LORA, "update", 960 * 2 + 40 * 14, (960 * 2 + 40 * 12) / 4),
        (replace(LORA, shares_base=True), "update", 40 * 14, (960 * 2 + 40 * 12) / 4),
        (FROZEN, "update", 4000, 1000),
    ],
)
def test_weights_and_moments_are_divided(size: ModelSize, phase: str, undivided: float, divided: float):
    assert undivided_bytes(size, phase) == undivided
    assert divided_bytes(size, phase, shard=4) == divided


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (FLOAT32, 800 + 16 * 100 + 4 * 200),
        (BFLOAT16, 400 + 10 * 100 + 2 * 200),
        (replace(BFLOAT16, outside=900, trained_outside=900), 1800 + 6 * 900),  # the end of the backward pass
        (LORA, 400 + 4 * 100 + 6 * 5),
    ],
)
def test_a_layer_is_in_flight_with_its_gradient_and_the_next_layer(size: ModelSize, expected: float):
    assert bytes_in_flight(size) == expected


def test_a_phase_gathers_the_models_that_it_uses():
    sizes = {**RUN, "reward a": BFLOAT16}
    assert gathered_bytes(sizes, "sample") == 4000 + 800
    assert gathered_bytes(sizes, "score") == 2000 + 400
    assert gathered_bytes(RUN, "score") == 0
    assert gathered_bytes(sizes, "targets") == 4000 + 800
    assert gathered_bytes({"policy": BFLOAT16, "reference": FROZEN}, "targets") == 4000 + 800
    assert gathered_bytes(sizes, "update") == 3200


def test_the_rest_of_a_device_is_what_one_device_needs_besides_its_models():
    memory = divided_memory(RUN, {"update": 50_000.0}, shard=2)["update"]
    assert memory.divided == {
        "policy": 6000 + 2000,
        "critic": 5400,
        "reference": 2000,
    }  # the policy's gradient is larger
    assert memory.rest == 50_000 - 16_000 - 10_800 - 4000
    assert memory.peak == 15_400 + 3200 + 19_200


def test_models_are_read_one_after_the_other():
    assert loading_bytes(RUN) == 8000  # policy and reference; the critic with the policy is 7600
    assert loading_bytes({"policy": BFLOAT16, "critic": replace(CRITIC, itemsize=2)}) == 2000 + 3600
    assert loading_bytes({"policy": LORA, "reward a": FROZEN, "reward b": FROZEN}) == 8000
    start = {"start": 20_000.0}
    assert divided_memory(RUN, start, 2)["start"].gathered == 4800
    assert divided_memory({"policy": FLOAT32, "reference": FROZEN}, start, 2, True)["start"].gathered == 8000


def test_a_checkpoint_has_weights_moments_and_the_policy():
    assert checkpoint_bytes(RUN, FROZEN) == 12 * 1900 + 4000


def test_gathering_and_reducing_move_all_but_the_own_share():
    alone = {"policy": FLOAT32}
    moved = moved_bytes(alone, devices=4, shard=4, passes=3)
    assert moved == {"sample": 3000, "score": 0, "targets": 3000, "update": 3 * (6000 + 3000) + 3000}
    # Two copies: half of the weights to gather, half of the gradients to reduce, and an all-reduce of the half.
    assert moved_bytes(alone, devices=4, shard=2, passes=3)["update"] == 3 * (4000 + 2000 + 2000) + 2000
    assert moved_bytes(alone, 4, 4, 3, lora_reference=True)["targets"] == 6000
    assert moved_bytes(RUN, 2, 2, 1)["targets"] == (4000 + 3600 + 4000) / 2


def test_weights_are_counted_as_they_are_divided():
    config = LlamaConfig(
        vocab_size=50, hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    size = count_weights(AutoModelForCausalLM.from_config(config), learns=True)
    layer = 8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 16 + 2 * 8
    assert size == ModelSize(3 * layer, layer, 2 * 50 * 8 + 8, 3 * layer + 808, layer, 808, 4)
    assert count_weights(AutoModelForCausalLM.from_config(config), learns=False).trained == 0


# ---- the plan --------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tiny_policy: Path, tmp_path: Path) -> dict[str, Any]:
    changes = {"rewards": [{"function": "f.py:f"}], "devices": 2, "memory_gb": 1}
    return settings(tiny_policy, tmp_path / "run", changes)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[PlanConfig]:
    """The settings of each forecast, which takes no step."""
    found: list[PlanConfig] = []

    def forecast(config: PlanConfig) -> Cost:
        found.append(config)
        return Cost(PEAKS, SECONDS, {"update": 0.1}, microbatches=3)

    monkeypatch.setattr(plans, "forecast", forecast)
    return found


def test_a_device_is_measured_with_its_share_of_the_batch(run: dict[str, Any], asked: list[PlanConfig]) -> None:
    plan = plans.plan(parse(PlanConfig, run))
    (share,) = asked
    assert (share.devices, share.rollout.batch_size, share.algorithm.minibatch_size) == (1, 8, 2)
    assert list(plan) == [
        *("devices", "shard", "phases", "peak_mb", "available_mb", "fits", "step_seconds", "step_seconds_error"),
        *("run_hours", "moved_mb", "loading_mb", "checkpoint_mb", "changes"),
    ]
    assert (plan["devices"], plan["shard"], plan["fits"], plan["available_mb"]) == (2, 2, True, 1000)
    assert plan["step_seconds"] == 4
    size = plans.model_sizes(parse(PlanConfig, run))["policy"]
    update = plan["phases"]["update"]
    assert update["models"]["policy"] == pytest.approx(size.weights * 8 / 1e6)
    assert set(update["models"]) == {"policy", "critic", "reference"}
    assert update["peak_mb"] == pytest.approx(
        sum(update["models"].values()) + update["gathered_mb"] + update["rest_mb"]
    )
    critic = plans.model_sizes(parse(PlanConfig, run))["critic"]
    once = (size.bytes + critic.bytes) / 2  # four optimizer steps of three micro-batches: weights twice, and gradients
    again = size.bytes / 2  # the policy alone reads a few responses again
    assert update["moved_mb"] == pytest.approx((12 * 3 * once + again) / 1e6)


def test_a_minibatch_smaller_than_the_devices_still_takes_all_steps(
    run: dict[str, Any], asked: list[PlanConfig]
) -> None:
    plan = plans.plan(parse(PlanConfig, run | {"devices": 8}))
    assert (asked[0].rollout.batch_size, asked[0].algorithm.minibatch_size) == (2, 1)
    assert plan["phases"]["update"]["seconds"] == 4  # two responses, but four optimizer steps


def test_dividing_the_weights_further_is_the_first_change(run: dict[str, Any], asked: list[PlanConfig]) -> None:
    run |= {"parallel": {"shard": 1}, "memory_gb": 1e-6}
    plan = plans.plan(parse(PlanConfig, run))
    assert not plan["fits"]
    assert next(iter(plan["changes"])) == "parallel.shard: 2"
    # Of the rest, the forecast here has the same peak for all: only fewer weights or states save anything.
    assert "policy.gradient_checkpointing: true" not in plan["changes"]
    assert not any("quantization" in change for change in plan["changes"])  # such a run would not start


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"devices": 3}, "rollout.batch_size"),
        ({"parallel": {"shard": 3}}, "parallel.shard"),
    ],
)
def test_a_run_that_would_not_start_is_refused(run: dict[str, Any], changes: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError) as refused:
        plans.plan(parse(PlanConfig, run | changes))
    assert refused.value.where == where


def test_the_command_prints_each_device(
    run: dict[str, Any], asked: list[PlanConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = parse(PlanConfig, run)
    monkeypatch.setattr("keel.training.plan_process.plan_in_subprocess", plans.plan)
    arguments = ["--policy.model", config.policy.model, "--prompts.path", "p.jsonl", "--output", "r", "--devices", "2"]
    command.run([*arguments, "--rollout.batch-size", "16", "--rewards", '[{"function": "f.py:f"}]'])
    printed = capsys.readouterr().out
    for words in ("memory of each of 2 devices", "gathered weights", "MB received", "while it loads", "of disk"):
        assert words in printed
