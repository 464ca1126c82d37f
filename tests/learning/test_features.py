"""The base run with one thing changed, and what that should change."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from keel.run.folder import RunFolder

from ..runs import PROMPTS, share_of_w3, train
from .runner import Metrics, Runner


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_in_the_loss(run: Runner, estimator: str) -> None:
    _, second = run({"algorithm.kl_in": "loss", "algorithm.kl_estimator": estimator})
    assert second["loss/kl"] > 0
    assert second["objective/kl"] > 0
    scores = [answer["score"] for answer in run.answers(step=2)]
    assert run.rewards(step=2) == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("place", ["reward", "loss"])
def test_a_strong_kl_holds_the_policy_back(place: str, run: Runner, tiny_policy: Path, tmp_path: Path) -> None:
    changes = {"algorithm.name": "reinforce", "algorithm.kl_in": place, "steps": 8, "optim.learning_rate": 5e-3}
    free = train(tiny_policy, tmp_path / "free", {**changes, "algorithm.kl_coef": 1e-6})
    assert run({**changes, "algorithm.kl_coef": 2.0})[-1]["objective/kl"] < 0.5 * free[-1]["objective/kl"]


def test_target_kl(run: Runner) -> None:
    """The first step's KL is 0: kl_coef * (1 - 0.2 * 16 / 100)."""
    first, second = run({"algorithm.target_kl": 1.0, "algorithm.kl_horizon": 100.0})
    assert first["objective/kl_coef"] == 0.05
    assert second["objective/kl_coef"] == pytest.approx(0.0484)


def test_no_kl_no_reference(run: Runner) -> None:
    metrics = run({"algorithm.kl_coef": 0.0})
    assert not any("objective/kl" in line for line in metrics)
    assert all(line["objective/rlhf_reward"] == line["objective/scores"] for line in metrics)


def test_another_reference(run: Runner, other_model: Path) -> None:
    first, _ = run({"reference": str(other_model)})
    assert first["objective/kl"] > 0.1
    scores = [answer["score"] - 0.05 * answer["kl"] for answer in run.answers()]
    assert run.rewards() == pytest.approx(scores, abs=1e-3)


FAR = {"optim.learning_rate": 3e-2, "algorithm.update_epochs": 4}


def test_dual_clip(run: Runner, tiny_policy: Path, tmp_path: Path) -> None:
    unbounded = train(tiny_policy, tmp_path / "unbounded", FAR)
    assert run({**FAR, "algorithm.dual_clip": 1.05})[0]["loss/policy"] < unbounded[0]["loss/policy"]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("loss_aggregation", "sequence"),
        ("loss_aggregation", "constant"),
        ("clip_target", "weight"),
        ("ratio_level", "sequence"),
    ],
)
def test_other_objectives(setting: str, value: str, run: Runner, tiny_policy: Path, tmp_path: Path) -> None:
    """The same responses in the first step, another loss, and therefore other responses in the second."""
    base = train(tiny_policy, tmp_path / "base", FAR)
    metrics = run({**FAR, f"algorithm.{setting}": value})
    assert metrics[0]["objective/scores"] == base[0]["objective/scores"]
    assert metrics[0]["loss/policy"] != pytest.approx(base[0]["loss/policy"], rel=1e-4)
    assert metrics[1]["objective/kl"] != pytest.approx(base[1]["objective/kl"], rel=1e-4)


def test_value_clip_range(run: Runner, tiny_policy: Path, tmp_path: Path) -> None:
    far = {**FAR, "optim.critic_learning_rate": 0.1}
    free = train(tiny_policy, tmp_path / "free", far)
    assert run({**far, "algorithm.value_clip_range": 1e-4})[0]["loss/value"] > free[0]["loss/value"]


def test_max_approx_kl(run: Runner) -> None:
    assert run({**FAR, "algorithm.max_approx_kl": 1e-6})[0]["policy/update_epochs"] == 1


def test_entropy_coef(run: Runner, base: Metrics) -> None:
    metrics = run({"algorithm.entropy_coef": 5.0})
    assert metrics[0]["policy/entropy"] > base[0]["policy/entropy"]
    assert metrics[1]["policy/entropy"] > base[1]["policy/entropy"] + 0.01


def test_temperature(run: Runner, base: Metrics) -> None:
    metrics = run({"rollout.temperature": 0.7})
    assert metrics[0]["policy/entropy"] < base[0]["policy/entropy"]


def test_scores_normalised_by_all_so_far(run: Runner) -> None:
    run({"reward.normalize": "running"})
    rewards = torch.tensor(run.rewards())
    assert float(rewards.mean()) == pytest.approx(0.0, abs=1e-3)
    assert float(rewards.std(correction=0)) == pytest.approx(1.0, abs=1e-3)


def test_scores_normalised_by_the_reference(run: Runner) -> None:
    """By a mean and a scale that stay the same: rewards are a straight line of the scores."""
    run({"reward.normalize": "reference", "algorithm.kl_in": "loss"})
    scores = [answer["score"] for step in (1, 2) for answer in run.answers(step)]
    rewards = [reward for step in (1, 2) for reward in run.rewards(step)]
    low, high = min(range(32), key=scores.__getitem__), max(range(32), key=scores.__getitem__)
    slope = (rewards[high] - rewards[low]) / (scores[high] - scores[low])
    assert slope > 2  # a random policy's scores vary little
    line = [rewards[low] + slope * (score - scores[low]) for score in scores]
    assert rewards == pytest.approx(line, abs=1e-3)


def test_clip_and_missing_end(run: Runner) -> None:
    def far_apart(completions: list[str], **_: Any) -> list[float]:
        return [9.0 if "w1" in text else -9.0 for text in completions]

    run({"reward.clip": 2.0, "reward.missing_eos_penalty": 0.5}, scorers=[far_apart])
    for answer, reward in zip(run.answers(), run.rewards(), strict=True):
        assert reward == pytest.approx((2.0 if answer["score"] > 0 else -2.0) - 0.5 * answer["truncated"])
    assert {answer["truncated"] for answer in run.answers()} == {True, False}


def test_bootstrap(run: Runner, base: Metrics) -> None:
    """At first every value is the mean return, which is above 0: so are then the returns of truncated responses."""
    metrics = run({"algorithm.truncation": "bootstrap"})
    assert metrics[0]["objective/scores"] == base[0]["objective/scores"] > 0
    assert metrics[0]["critic/returns"] > base[0]["critic/returns"]


def test_segments(run: Runner) -> None:
    def lengths(segments: list[list[str]], **_: Any) -> list[list[float]]:
        return [[float(len(part)) for part in parts] for parts in segments]

    run({"reward.segments": "w1", "algorithm.kl_coef": 0.0}, scorers=[lengths])
    answers = run.answers()
    assert [answer["score"] for answer in answers] == [float(len(answer["response"])) for answer in answers]
    several = [answer for answer in answers if "w1" in answer["response"][:-3]]
    assert several
    for answer in several:
        assert sum(reward != 0 for reward in answer["rewards"]) > 1
        assert sum(answer["rewards"]) == answer["score"]


def test_critic_from_the_reward_model(run: Runner, reward_model: Path) -> None:
    metrics = run({"critic.init": "reward", "rewards": [{"model": str(reward_model)}]}, scorers=[])
    assert metrics[0]["critic/values"] != 0.0
    assert metrics[0][f"rewards/{reward_model.name}"] == metrics[0]["objective/scores"]


def test_critic_from_a_folder(run: Runner, reward_model: Path) -> None:
    assert run({"critic.init": str(reward_model)})[0]["critic/values"] != 0.0


def test_critic_warm_up(run: Runner, tiny_policy: Path, base: Metrics) -> None:
    metrics = run({"critic.warmup_steps": 1, "checkpoint.every": 1})
    start = load_file(tiny_policy / "model.safetensors")
    folders = [RunFolder(run.output).checkpoints / f"step-00000{step}" / "policy" for step in (1, 2)]
    after_first, after_second = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(value, start[name]) for name, value in after_first.items())
    assert not all(torch.equal(value, start[name]) for name, value in after_second.items())
    assert "policy/grad_norm" not in metrics[0]
    assert metrics[0]["critic/grad_norm"] == pytest.approx(base[0]["critic/grad_norm"], rel=0.2)
    assert metrics[1]["critic/values"] != 0.0


def test_lora(run: Runner, tiny_policy: Path) -> None:
    changes = {"policy.lora": {"r": 2}, "optim.learning_rate": 1e-2, "algorithm.name": "a2c"}
    first, second = run(changes)
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-6)
    assert second["objective/kl"] > 1e-6
    weights = load_file(RunFolder(run.output).checkpoints / "step-000002" / "weights.safetensors")
    trained = {name for name in weights if name.startswith("policy.")}
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("lora_" in name for name in load_file(run.output / "policy" / "model.safetensors"))


def test_cosine_schedule_with_warm_up(run: Runner) -> None:
    """One update a step: half the rate, then 1, (1 + cos 60) / 2, (1 + cos 120) / 2."""
    changes = {"algorithm.name": "a2c", "optim.schedule": "cosine", "optim.warmup_steps": 1, "steps": 4}
    rates = [line["policy/learning_rate"] for line in run(changes)]
    assert rates == pytest.approx([1e-3, 2e-3, 1.5e-3, 0.5e-3])


def test_several_scorers_with_weights(run: Runner, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "async def long(completions):\n    return [float(len(text.split())) for text in completions]\n\n"
        "def early(completions):\n    return [1.0 if text.startswith(' w1') else None for text in completions]\n"
    )
    sources = [{"function": f"{file}:long", "weight": 2.0}, {"function": f"{file}:early", "weight": -0.5}]
    first, _ = run({"rewards": sources})
    assert first["rewards/early"] == 1.0  # a mean over the answers that it had a score for
    early = sum(answer["response"].startswith(" w1") for answer in run.answers()) / 16
    total = 2.0 * first["rewards/long"] - 0.5 * early + first["rewards/share_of_w3"]
    assert first["objective/scores"] == pytest.approx(total, rel=1e-5)


def test_groups(run: Runner) -> None:
    def constant(completions: list[str], **_: Any) -> list[float]:
        return [1.0 for _ in completions]

    changes = {"algorithm.name": "grpo", "rollout.group_size": 8, "algorithm.kl_coef": 0.0}
    metrics = run(changes, scorers=[constant])
    assert [line["groups/equal_scores"] for line in metrics] == [1.0, 1.0]
    prompts = [answer["prompt"] for answer in run.answers()]
    assert prompts == [prompts[0]] * 8 + [prompts[8]] * 8
    assert prompts[0] != prompts[8]
    assert len({tuple(answer["tokens"]) for answer in run.answers()[:8]}) > 1
    assert not any(advantage for answer in run.answers() for advantage in answer["advantages"])


def test_stop_tokens(run: Runner) -> None:
    run({"rollout.stop": ["w1", "w2"]})
    assert {answer["tokens"][-1] for answer in run.answers() if not answer["truncated"]} <= {2, 5, 6}
    assert not any({2, 5, 6} & set(answer["tokens"][:-1]) for answer in run.answers())


def test_evaluation_on_the_way(run: Runner, tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "w11"}\n{"prompt": "w12 w13"}\n')
    first, second = run({"evaluate.every": 2, "evaluate.prompts": str(held_out)})
    names = {"score", "rewards/share_of_w3", "kl", "reference_logprob", "entropy", "length", "truncated"}
    assert {name for name in second if name.startswith("evaluate/")} == {f"evaluate/{name}" for name in names}
    assert not any(name.startswith("evaluate/") for name in first)


def test_tensorboard(run: Runner) -> None:
    pytest.importorskip("tensorboard")
    run({"log.trackers": ["tensorboard"]})
    assert list((run.output / "tensorboard").glob("events.*"))


def test_bfloat16(run: Runner) -> None:
    run({"policy.dtype": "bfloat16"})
    assert AutoModelForCausalLM.from_pretrained(run.output / "policy").dtype == torch.bfloat16


def test_every_prompt_is_seen_once_in_a_pass(run: Runner) -> None:
    run({"rollout.batch_size": 4, "steps": 3, "algorithm.name": "reinforce"}, prompts=[*PROMPTS, "w10", "w11"])
    seen = [answer["prompt"] for step in (1, 2, 3) for answer in run.answers(step)]
    assert sorted(seen[:6]) == sorted(seen[6:]) == sorted([*PROMPTS, "w10", "w11"])
    assert seen[:6] != seen[6:]


def test_scores_are_the_functions(run: Runner) -> None:
    run({})
    for answer in run.answers():
        assert answer["score"] == pytest.approx(share_of_w3([answer["response"]])[0])
