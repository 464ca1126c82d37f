"""The commands as Python functions: what each takes and returns, with rows in Python in place of files."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import keel
from keel.errors import ConfigError, DataError, RewardError

from .runs import PROMPTS, lines, settings, share_of_w3

PAIRS = [{"prompt": f"w{i}", "chosen": "w5 w6", "rejected": f"w7 w{i}"} for i in range(1, 13)]
TEXTS = [f"w1 w2 w{i} w4" for i in range(3, 13)]


def supervised(model: Path, output: Path, **more: Any) -> dict[str, Any]:
    return {"output": str(output), "model": str(model), "batch_size": 4, "max_tokens": 16, **more}


def test_keel_is_imported_without_torch():
    code = "import sys, keel; keel.train, keel.sft; print(sorted({'torch', 'pydantic', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_functions_stay_functions_after_a_call(tiny_policy: Path, tmp_path: Path):
    for run in ("one", "two"):
        result = keel.train(settings(tiny_policy, tmp_path / run, {"steps": 1}), [share_of_w3], PROMPTS)
    assert result.folder == tmp_path / "two"
    assert result.metrics == {k: v for k, v in lines(result.metrics_file)[-1].items() if k != "step"}
    assert [path.name for path in result.checkpoints.iterdir()] == ["step-000001"]
    AutoModelForCausalLM.from_pretrained(result.model)


def test_sft_on_texts_in_python_resumes(tiny_policy: Path, tmp_path: Path):
    config = supervised(tiny_policy, tmp_path / "sft", epochs=1)
    result = keel.sft(config, data=TEXTS)
    assert result.model == tmp_path / "sft" / "model"
    assert result.metrics["loss"] > 0
    assert keel.sft(config, data=TEXTS, resume=True).metrics["loss"] == pytest.approx(result.metrics["loss"])
    with pytest.raises(ConfigError):  # other rows
        keel.sft(config, data=TEXTS[:-1], resume=True)


def test_reward_and_dpo_on_a_data_set(tiny_policy: Path, tmp_path: Path):
    pairs = datasets.Dataset.from_list(PAIRS)
    scorer = keel.reward(supervised(tiny_policy, tmp_path / "reward"), data=pairs, eval_data=PAIRS[:2])
    assert AutoModelForSequenceClassification.from_pretrained(scorer.model).config.num_labels == 1
    assert scorer.metrics["accuracy"] in (0.0, 0.5, 1.0)  # of two held-out rows
    policy = keel.dpo(supervised(tiny_policy, tmp_path / "dpo"), data=pairs)
    assert policy.model == tmp_path / "dpo" / "policy"
    AutoModelForCausalLM.from_pretrained(policy.model)


def test_rows_in_python_need_a_run_folder(tiny_policy: Path):
    with pytest.raises(ConfigError) as refused:
        keel.sft({"model": str(tiny_policy)}, data=TEXTS)
    assert refused.value.where == "output"


def test_sample_then_evaluate_then_doctor(tiny_policy: Path, tmp_path: Path):
    sampling = {"num_responses": 2, "max_response_tokens": 4}
    made = keel.sample(
        {"model": str(tiny_policy), "output": str(tmp_path / "s.jsonl"), "sampling": sampling}, prompts=PROMPTS
    )
    assert [row["prompt"] for row in made.rows] == PROMPTS
    assert all(len(row["responses"]) == 2 for row in made.rows)
    assert made.rows == lines(made.file)
    found = keel.evaluate(
        {"policy": str(tiny_policy), "output": str(tmp_path / "e.json"), "sampling": sampling},
        prompts=[{"prompt": text} for text in PROMPTS],
        scorers=[share_of_w3],
    )
    assert found.file is not None
    assert json.loads(found.file.read_text())["figures"]["policy"]["score"] == found.metrics["policy"]["score"]
    run = keel.train(settings(tiny_policy, tmp_path / "run", {"steps": 1}), [share_of_w3], PROMPTS)
    assert keel.doctor(run.folder).last_step == 1


# ---- a loop of one's own ---------------------------------------------------------------------------------------------


def trainer_of(model: Path, output: Path, **changes: Any) -> keel.PolicyTrainer:
    return keel.PolicyTrainer.from_config(settings(model, output, {"steps": 3, **changes}), prompts=PROMPTS)


def test_a_loop_of_ones_own_is_the_loop_of_keel_train(tiny_policy: Path, tmp_path: Path):
    expected = keel.train(settings(tiny_policy, tmp_path / "run", {"steps": 3}), [share_of_w3], PROMPTS)
    trainer = trainer_of(tiny_policy, tmp_path / "mine")
    for _ in range(3):
        rollouts = trainer.sample()
        metrics = trainer.update(rollouts, share_of_w3(rollouts.texts))
    for name in ("objective/scores", "objective/kl", "loss/policy", "loss/value", "policy/entropy"):
        assert metrics[name] == expected.metrics[name]
    trainer.save(tmp_path / "policy")
    weights = AutoModelForCausalLM.from_pretrained(expected.model).state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(tmp_path / "policy").state_dict().items():
        assert torch.equal(weight, weights[name])


def test_prompts_of_ones_own_and_groups(tiny_policy: Path, tmp_path: Path):
    trainer = trainer_of(tiny_policy, tmp_path / "mine", **{"algorithm.name": "grpo", "rollout.group_size": 4})
    rollouts = trainer.sample(["w1 w2", {"prompt": "w3", "kind": "b"}])
    assert [prompt.content for prompt in rollouts.prompts] == ["w1 w2"] * 4 + ["w3"] * 4
    assert rollouts.prompts[-1].columns["kind"] == "b"
    assert trainer.update(rollouts, torch.arange(8.0))["objective/scores"] == 3.5


@pytest.mark.parametrize("scores", [[1.0], [float("nan")] * 16, torch.zeros(16, 1)])
def test_scores_that_do_not_fit_are_refused_and_nothing_has_moved(tiny_policy: Path, tmp_path: Path, scores: Any):
    trainer = trainer_of(tiny_policy, tmp_path / "mine")
    rollouts = trainer.sample()
    before = trainer.setup.actor_critic.policy.lm_head.weight.clone()
    with pytest.raises(RewardError) as refused:
        trainer.update(rollouts, scores)
    assert refused.value.where == "scores"
    assert torch.equal(before, trainer.setup.actor_critic.policy.lm_head.weight)
    assert trainer.state.step == 0


def test_after_the_last_step_there_is_none(tiny_policy: Path, tmp_path: Path):
    trainer = trainer_of(tiny_policy, tmp_path / "mine", steps=1)
    rollouts = trainer.sample()
    trainer.update(rollouts, share_of_w3(rollouts.texts))
    with pytest.raises(ConfigError) as refused:
        trainer.update(rollouts, share_of_w3(rollouts.texts))
    assert refused.value.where == "steps"


def test_a_row_that_no_file_can_hold_is_named(tiny_policy: Path, tmp_path: Path):
    rows = [{"text": "w1"}, {"text": "w2", "when": object()}]
    with pytest.raises(DataError):
        keel.sft(supervised(tiny_policy, tmp_path / "sft"), data=rows)
