"""The forecast of a run: sizes are exact, peaks come true, and changes are tried until the run fits."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from keel.config import PlanConfig, TrainConfig, parse
from keel.errors import ConfigError
from keel.learn.update import Updater
from keel.models.loading import load_causal_lm, load_classifier, load_tokenizer
from keel.models.reward_model import RewardModel
from keel.training import plan as plans
from keel.training import probe as probes
from keel.training.plan import changes_to_fit, possible_changes, resident
from keel.training.plan_process import plan_in_subprocess
from keel.training.probe import Cost
from keel.training.setup import build_training_setup
from keel.world import ALONE

from ..runs import settings

PEAK = """
import json, re, sys, torch
import keel.training.policy

def memory(kind):  # of this process alone; getrusage also counts what its parent had when it was forked
    return int(re.search(kind + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

torch.set_num_threads(1)
idle = memory("VmRSS")
keel.training.policy.train_policy(json.loads(sys.argv[1]))
print(idle, memory("VmHWM"))
"""


@pytest.fixture
def run(tiny_policy: Path, tmp_path: Path) -> dict[str, Any]:
    """A run with a reward model, its prompts in a file."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("w1 w2", "w5", "w6 w7 w8", "w9")))
    scorer = RewardModel.load(str(tiny_policy), template="{prompt}{response}")
    torch.nn.init.normal_(scorer.head.weight)
    scorer.save(tmp_path / "scorer")
    return settings(
        tiny_policy, tmp_path / "run", {"prompts.path": str(prompts), "rewards": [{"model": str(tmp_path / "scorer")}]}
    )


def test_the_sizes_are_those_of_the_loaded_models(run: dict[str, Any], tiny_policy: Path) -> None:
    sizes = resident(parse(PlanConfig, run))
    policy, critic = (
        sum(p.numel() * 4 for p in model.parameters()) / 1e6
        for model in (load_causal_lm(str(tiny_policy)), load_classifier(str(tiny_policy), to_train=True))
    )
    assert sizes["policy"] == pytest.approx({"weights": policy, "gradients": policy, "optimizer": 2 * policy})
    assert sizes["critic"] == pytest.approx({"weights": critic, "gradients": critic, "optimizer": 2 * critic})
    assert sizes["reference"] == pytest.approx({"weights": policy, "gradients": 0, "optimizer": 0})
    assert list(sizes) == ["policy", "critic", "reference", "reward scorer"]


def test_what_learns_in_bfloat16_has_gradients_moments_and_masters_in_float32(run: dict[str, Any]) -> None:
    exact = resident(parse(PlanConfig, run))
    run["policy"] |= {"dtype": "bfloat16"}
    sizes = resident(parse(PlanConfig, run))
    size = exact["policy"]["weights"]
    assert sizes["policy"] == pytest.approx({"weights": size / 2, "gradients": size, "optimizer": 3 * size})
    assert sizes["reference"] == pytest.approx({"weights": size / 2, "gradients": 0, "optimizer": 0})


def test_every_reward_model_has_its_column(run: dict[str, Any], tiny_policy: Path, tmp_path: Path) -> None:
    folders = [tmp_path / name / "model" for name in ("helpful", "honest", "old/honest")]
    for folder in folders:
        shutil.copytree(tiny_policy, folder)
    run["rewards"] = [{"model": str(folder)} for folder in folders]
    sizes = resident(parse(PlanConfig, run))
    assert list(sizes)[3:] == ["reward helpful", "reward honest", "reward honest_2"]
    assert sizes["reward honest_2"]["weights"] == pytest.approx(sizes["reward helpful"]["weights"])


def test_lora_and_a_shared_trunk_need_one_model(run: dict[str, Any]) -> None:
    run["policy"]["lora"], run["critic"] = {"r": 2}, {"sharing": "shared"}
    sizes = resident(parse(PlanConfig, run))
    assert "critic" not in sizes
    assert "reference" not in sizes
    assert 0 < sizes["policy"]["gradients"] < sizes["policy"]["weights"] / 2


@pytest.mark.parametrize(("quantization", "bits"), [("nf4", 4.13), ("int8", 9.0)])
def test_a_quantized_base_counts_its_bits(
    run: dict[str, Any], tiny_policy: Path, quantization: str, bits: float
) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install '.[quantization]'")
    run["policy"] |= {"lora": {"r": 2}, "dtype": "bfloat16"}
    plain = resident(parse(PlanConfig, run))
    run["policy"] |= {"quantization": quantization}
    sizes = resident(parse(PlanConfig, run))
    base = load_causal_lm(str(tiny_policy))
    layers = [layer.weight for layer in base.model.modules() if isinstance(layer, torch.nn.Linear)]
    saved = sum(weight.numel() for weight in layers) * (16 - bits) / 8 / 1e6
    # Rows of 32 weights have one float32 scale, a bit a weight.
    assert plain["policy"]["weights"] - sizes["policy"]["weights"] == pytest.approx(saved, rel=0.1)
    assert sizes["critic"] == plain["critic"]  # on the policy's base, whatever that weighs
    assert sizes["policy"]["optimizer"] == plain["policy"]["optimizer"]


def test_a_quantized_base_is_proposed_for_an_adapter(run: dict[str, Any]) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install '.[quantization]'")
    assert possible_changes(parse(PlanConfig, run))[-1] == ("policy", {"lora": {}, "quantization": "nf4"})
    run["policy"] |= {"lora": {"r": 2}}
    assert possible_changes(parse(PlanConfig, run))[-1] == ("policy", {"quantization": "nf4"})


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read in /proc")
def test_the_peak_comes_true(run: dict[str, Any], tiny_policy: Path, tmp_path: Path) -> None:
    """With layers that weigh more than the libraries do: a wrong count of them would show."""
    config = AutoConfig.from_pretrained(tiny_policy)
    config.update({"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "head_dim": 64})
    config.update({"num_attention_heads": 8, "num_key_value_heads": 8})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "large")
    load_tokenizer(str(tiny_policy)).save_pretrained(tmp_path / "large")
    run["policy"]["model"] = str(tmp_path / "large")
    forecast = plan_in_subprocess(parse(PlanConfig, run))
    lived = subprocess.run([sys.executable, "-c", PEAK, json.dumps(run)], capture_output=True, text=True, check=True)
    idle, peak = (float(line) / 1e6 for line in lived.stdout.split()[-2:])
    assert peak > 2 * idle
    assert forecast["peak_mb"] == pytest.approx(peak, rel=0.15)
    assert forecast["fits"]
    assert forecast["changes"] == {}
    assert set(forecast["phases"]) == {"start", "sample", "score", "targets", "update"}


def test_a_layer_counts_as_often_as_there_are_layers(
    run: dict[str, Any], tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = {"update": 0.1}
    costs = iter([Cost({"update": 100.0}, {"update": 2.0}, errors), Cost({"update": 130.0}, {"update": 2.5}, errors)])

    monkeypatch.setattr(plans, "probe", lambda *_: next(costs))
    run["rewards"] = []
    depth = load_causal_lm(str(tiny_policy)).config.num_hidden_layers
    found = plans.forecast(parse(PlanConfig, run))
    assert found.peaks["update"] == 100 + 30 * (depth - 1)
    assert found.seconds["update"] == 2 + 0.5 * (depth - 1)
    assert found.step_error == pytest.approx(0.1 * depth)


def test_one_epoch_is_taken_and_counts_as_often_as_there_are_epochs(
    run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def probe(values: dict[str, Any], *_: Any) -> Cost:
        taken.append(values["algorithm"]["update_epochs"])
        return Cost({"update": 100.0}, {"sample": 1.0, "update": 2.0}, {"sample": 0.1, "update": 0.2})

    monkeypatch.setattr(plans, "probe", probe)
    found = plans.forecast(parse(PlanConfig, run | {"algorithm": {"name": "ppo", "update_epochs": 5}}))
    assert taken == [1, 1]
    assert found.peaks == {"update": 100.0}
    assert found.seconds == {"sample": 1.0, "update": 10.0}
    assert found.errors["update"] >= 1.0


def test_models_of_one_depth_are_made_deeper_together(
    run: dict[str, Any], tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of five layers and of nine: each kind counts as often as its models have layers."""
    sizes = {"policy": 5, "reward": 9, "other": 9}
    for name, layers in sizes.items():
        folder = Path(shutil.copytree(tiny_policy, tmp_path / name))
        config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": layers, "layer_types": None}
        (folder / "config.json").write_text(json.dumps(config))
    run["policy"]["model"] = str(tmp_path / "policy")
    run["rewards"] = [{"model": str(tmp_path / name)} for name in ("reward", "other")]
    asked = []

    def probe(values: dict[str, Any], given: dict[str, int], *_: Any) -> Cost:
        folders = [values["policy"]["model"], *(reward["model"] for reward in values["rewards"])]
        depths = [given[folder] for folder in folders]
        asked.append(depths)
        memory = 100.0 + sum(factor * depth for factor, depth in zip((1, 10, 100), depths, strict=True))
        return Cost({"update": memory}, {"update": memory / 1000})

    monkeypatch.setattr(plans, "probe", probe)
    found = plans.forecast(parse(PlanConfig, run))
    assert asked == [[1, 1, 1], [5, 1, 1], [1, 7, 7]]
    assert found.peaks["update"] == pytest.approx(100 + 5 + 90 + 900)
    assert found.seconds["update"] == pytest.approx((100 + 5 + 90 + 900) / 1000)


def test_what_else_the_machine_does_is_not_counted() -> None:
    """Waiting is no work, on whatever clock."""
    state = probes.Watched(step=0, kl_coef=0.0)
    with state.timed("wait"):
        time.sleep(0.5)
    with state.timed("work"):
        began = time.thread_time()
        while time.thread_time() - began < 0.3:
            pass
    assert state.seconds["wait"] < 0.2
    assert 0.3 <= state.seconds["work"] < 0.5


def test_changes_come_one_on_top_of_the_other_until_the_run_fits(
    run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[PlanConfig] = []

    def forecast(config: PlanConfig) -> Cost:
        asked.append(config)
        return Cost({"update": 10e6 / len(asked)}, {"update": 1.0})

    monkeypatch.setattr(plans, "forecast", forecast)
    found = changes_to_fit(parse(PlanConfig, run), peak=11e6, available=4e6)
    assert [round(figures["peak MB"], 1) for figures in found.values()] == [10.0, 5.0, 3.3]
    last = asked[-1]
    assert (last.algorithm.microbatch_tokens, last.policy.gradient_checkpointing) == (2048, True)
    assert last.critic.sharing == "shared"
    assert last.policy.dtype == "float32"


def test_a_change_that_saves_nothing_is_left_out(run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 adds 2 bytes to each weight that learns in float32, and helps only where other things weigh more."""
    monkeypatch.setattr(
        plans,
        "forecast",
        lambda config: Cost({"update": 9e6 + 1e6 * (config.policy.dtype == "bfloat16")}, {"update": 1.0}),
    )
    assert not changes_to_fit(parse(PlanConfig, run), peak=9e6, available=4e6)


def test_no_change_is_proposed_that_is_made_already_or_has_no_effect(run: dict[str, Any]) -> None:
    run["policy"] |= {"gradient_checkpointing": True, "dtype": "bfloat16", "lora": {"r": 2}, "quantization": "nf4"}
    run["algorithm"] |= {"name": "grpo", "microbatch_tokens": 1024}
    assert possible_changes(parse(PlanConfig, run)) == []


@pytest.mark.parametrize(("wanted", "mean"), [(None, 6.0), (2, 1.9)])
def test_answers_have_the_length_that_was_asked_for(run: dict[str, Any], wanted: int | None, mean: float) -> None:
    run["rollout"]["batch_size"] = 512
    setup = build_training_setup(parse(TrainConfig, run), [], None, ALONE)
    ends = probes._ends(setup, wanted)
    with torch.no_grad():
        for weight in setup.actor_critic.policy.parameters():
            weight.mul_(0.01)  # a model that knows nothing
    assert float(replace(setup, end_ids=ends).respond(1).lengths.float().mean()) == pytest.approx(mean, abs=0.3)


def test_a_model_that_is_not_there(run: dict[str, Any]) -> None:
    run["policy"]["model"] = "/nowhere/at/all"
    with pytest.raises(ConfigError) as refused:
        plan_in_subprocess(parse(PlanConfig, run))
    assert refused.value.where == "/nowhere/at/all"


def test_the_caller_of_a_forecast_does_not_load_torch() -> None:
    code = "import sys, keel.training.plan_process; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_nothing_is_loaded_nor_written(run: dict[str, Any], tiny_policy: Path, tmp_path: Path) -> None:
    """Folders with settings and tokenizer alone are enough, and the run folder is not made."""
    for folder in (tmp_path / "policy", tmp_path / "scorer"):
        if not folder.exists():
            shutil.copytree(tiny_policy, folder)
        (folder / "model.safetensors").unlink()
    run["policy"]["model"] = str(tmp_path / "policy")
    before = sorted(tmp_path.rglob("*"))
    found = plans.forecast(parse(PlanConfig, run))
    assert set(found.seconds) == {"start", "sample", "score", "targets", "update"}
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_minibatch_is_taken_and_counts_as_often_as_there_are(
    run: dict[str, Any], monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    """Each clock reading is a second, so a phase takes one, and the update as many as there are minibatches."""
    readings, taken = iter(range(10_000)), []
    step = Updater._optimizer_step

    def spy(self: Updater, batch: Any, rows: list[int], *rest: Any) -> None:
        taken.append(len(rows))
        step(self, batch, rows, *rest)

    monkeypatch.setattr(probes, "_work", lambda: (float(next(readings)),))
    monkeypatch.setattr(Updater, "_optimizer_step", spy)
    run["algorithm"] = {"name": algorithm, "minibatch_size": 8, "update_epochs": 1}
    values = parse(TrainConfig, run).model_dump()
    depths = dict.fromkeys((run["policy"]["model"], run["rewards"][0]["model"]), 1)
    cost = probes.probe(values, depths)
    assert set(taken) == {8}
    assert (cost.seconds["sample"], cost.seconds["update"]) == (1.0, 2.0)


def test_the_updater_takes_a_policy_for_what_it_is_at_full_depth(run: dict[str, Any]) -> None:
    """Graphs of small models are in memory together; a few layers are always small."""
    config = parse(TrainConfig, run)
    updater = build_training_setup(config, [], None, ALONE).updater
    assert updater._small
    assert [probes.OneMinibatch.like(updater, small)._small for small in (True, False)] == [True, False]
    assert plans.policy_is_small(parse(PlanConfig, run))
