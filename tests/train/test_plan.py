"""The forecast of a run: sizes are exact, peaks come true, and changes are tried until the run fits."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from keel.config import PlanConfig, TrainConfig, parse
from keel.errors import ConfigError
from keel.models.loading import load_causal_lm, load_classifier
from keel.train import plan as plans
from keel.train import probe as probes
from keel.train.plan import changes_to_fit, plan, resident
from keel.train.probe import Cost
from keel.train.setup import build_parts
from keel.world import World

from ..runs import settings

PEAK = """
import json, resource, sys, torch
import keel
torch.set_num_threads(1)
keel.train(json.loads(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


@pytest.fixture
def run(tiny_policy: Path, tmp_path: Path) -> dict[str, Any]:
    """A run with a reward model, its prompts in a file."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("w1 w2", "w5", "w6 w7 w8", "w9")))
    return settings(
        tiny_policy, tmp_path / "run", {"prompts.path": str(prompts), "rewards": [{"model": str(tiny_policy)}]}
    )


def test_the_sizes_are_those_of_the_loaded_models(run: dict[str, Any], tiny_policy: Path) -> None:
    sizes = resident(parse(PlanConfig, run))
    policy, critic = (
        sum(p.numel() * 4 for p in model.parameters()) / 1e6
        for model in (load_causal_lm(str(tiny_policy)), load_classifier(str(tiny_policy)))
    )
    assert sizes["policy"] == pytest.approx({"weights": policy, "gradients": policy, "optimizer": 2 * policy})
    assert sizes["critic"] == pytest.approx({"weights": critic, "gradients": critic, "optimizer": 2 * critic})
    assert sizes["reference"] == pytest.approx({"weights": policy, "gradients": 0, "optimizer": 0})
    assert list(sizes) == ["policy", "critic", "reference", f"reward {tiny_policy.name}"]


def test_lora_and_a_shared_trunk_need_one_model(run: dict[str, Any]) -> None:
    run["policy"]["lora"], run["critic"] = {"r": 2}, {"sharing": "shared"}
    sizes = resident(parse(PlanConfig, run))
    assert "critic" not in sizes
    assert "reference" not in sizes
    assert 0 < sizes["policy"]["gradients"] < sizes["policy"]["weights"] / 2


@pytest.mark.slow
def test_the_peak_comes_true(run: dict[str, Any]) -> None:
    forecast = plan(parse(PlanConfig, run))
    lived = subprocess.run([sys.executable, "-c", PEAK, json.dumps(run)], capture_output=True, text=True, check=True)
    assert forecast["peak_mb"] == pytest.approx(float(lived.stdout.split()[-1]) / 1e6, rel=0.15)
    assert forecast["fits"]
    assert forecast["changes"] == {}
    assert set(forecast["phases"]) == {"start", "sample", "score", "targets", "update"}
    assert forecast["step_seconds"] == pytest.approx(
        sum(part["seconds"] for phase, part in forecast["phases"].items() if phase != "start")
    )


def test_a_layer_counts_as_often_as_there_are_layers(
    run: dict[str, Any], tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = iter([Cost({"update": 100.0}, {"update": 2.0}), Cost({"update": 130.0}, {"update": 2.5})])

    class Pool:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def __enter__(self) -> "Pool":
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, *_: Any) -> "Pool":
            return self

        def result(self) -> Cost:
            return next(costs)

    monkeypatch.setattr(plans, "ProcessPoolExecutor", Pool)
    run["rewards"] = []
    depth = load_causal_lm(str(tiny_policy)).config.num_hidden_layers
    found = plans.forecast(parse(PlanConfig, run))
    assert found.peaks["update"] == 100 + 30 * (depth - 1)
    assert found.seconds["update"] == 2 + 0.5 * (depth - 1)


def test_changes_come_one_on_top_of_the_other_until_the_run_fits(
    run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[PlanConfig] = []

    def forecast(config: PlanConfig) -> Cost:
        asked.append(config)
        return Cost({"update": 10e6 / len(asked)}, {"update": 1.0})

    monkeypatch.setattr(plans, "forecast", forecast)
    found = changes_to_fit(parse(PlanConfig, run), available=4e6)
    assert [round(figures["peak MB"], 1) for figures in found.values()] == [10.0, 5.0, 3.3]
    last = asked[-1]
    assert (last.algorithm.microbatch_tokens, last.policy.gradient_checkpointing) == (2048, True)
    assert last.critic.sharing == "shared"
    assert last.policy.dtype == "float32"


@pytest.mark.parametrize(("wanted", "mean"), [(None, 6.0), (2, 1.9)])
def test_answers_have_the_length_that_was_asked_for(run: dict[str, Any], wanted: int | None, mean: float) -> None:
    run["rollout"]["batch_size"] = 512
    parts = build_parts(parse(TrainConfig, run), [], None, World.single())
    ends = probes._ends(parts, wanted)
    with torch.no_grad():
        for weight in parts.actor_critic.policy.parameters():
            weight.mul_(0.01)  # a model that knows nothing
    assert float(replace(parts, end_ids=ends).respond(1).lengths.float().mean()) == pytest.approx(mean, abs=0.3)


def test_a_model_that_is_not_there(run: dict[str, Any]) -> None:
    run["policy"]["model"] = "/nowhere/at/all"
    with pytest.raises(ConfigError, match="/nowhere/at/all"):
        plan(parse(PlanConfig, run))
