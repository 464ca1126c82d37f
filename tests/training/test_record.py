"""What a run leaves in its folder, and what plain transformers makes of it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import keel
from keel.config import TrainConfig, parse
from keel.errors import ConfigError, RewardError
from keel.run.folder import RunFolder
from keel.training.setup import build_training_setup
from keel.world import World

from ..runs import PROMPTS, lines, settings, share_of_w3, train

ONE = World(0, 1, torch.device("cpu"))


def test_the_run_folder(tiny_policy: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    metrics = train(tiny_policy, output, {"steps": 3, "checkpoint.every": 1, "log.rollouts_per_step": 2})
    folder = RunFolder(output)
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert [path.name for path in sorted(folder.checkpoints.iterdir())] == ["step-000002", "step-000003"]
    saved = yaml.safe_load(folder.config.read_text())
    assert saved["algorithm"]["minibatch_size"] == 4  # the defaults that were chosen are written down
    assert TrainConfig.model_validate(saved) == parse(TrainConfig, saved)
    answers = lines(folder.rollouts)
    assert [line["step"] for line in answers] == [1, 1, 2, 2, 3, 3]
    for answer in answers:
        assert answer["prompt"] in PROMPTS
        assert answer["score"] == pytest.approx(share_of_w3([answer["response"]])[0])
        assert answer["scores"] == {"share_of_w3": answer["score"]}
        for name in ("tokens", "logprobs", "ref_logprobs", "values", "rewards", "advantages"):
            assert len(answer[name]) == answer["length"]
        kl = sum(answer["logprobs"]) - sum(answer["ref_logprobs"])
        assert answer["kl"] == pytest.approx(kl, abs=1e-3)
        assert sum(answer["rewards"]) == pytest.approx(answer["score"] - 0.05 * kl, abs=1e-3)
        assert answer["truncated"] is (answer["tokens"][-1] != 2)


def test_the_first_step_starts_at_the_reference(tiny_policy: Path, tmp_path: Path) -> None:
    first, second = train(tiny_policy, tmp_path / "run")
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-6)  # the log-probs are those of the sampler
    assert second["objective/kl"] > 0.0
    assert first["objective/kl_coef"] == 0.05
    assert first["critic/values"] == pytest.approx(first["objective/scores"], rel=0.5)  # the mean return, over tokens
    assert first["critic/explained_variance"] == pytest.approx(0.0, abs=0.05)  # the head starts at zero
    assert first["response/length"] == pytest.approx(first["perf/tokens_per_second"] * first["time/step_seconds"] / 16)
    assert second["progress/responses"] == 32


def test_a_second_run_in_the_same_process_may_follow(tiny_policy: Path, tmp_path: Path) -> None:
    """The folder is let go of at the end, and after a failure as well."""
    output = tmp_path / "run"

    def broken(**_: Any) -> list[float]:
        raise OSError("no connection")

    for _ in range(2):
        with pytest.raises(RewardError, match=r"broken \(test_record\.py:\d+\): OSError: no connection"):
            train(tiny_policy, output, scorers=[broken])
    train(tiny_policy, output)
    with pytest.raises(ConfigError, match="already holds a run"):
        train(tiny_policy, output)


def test_when_a_scorer_fails_the_finished_steps_are_in_a_checkpoint(tiny_policy: Path, tmp_path: Path) -> None:
    calls: list[int] = []

    def tired(completions: list[str], **_: Any) -> list[float]:
        calls.append(len(completions))
        return [math.nan if len(calls) == 6 else value for value in share_of_w3(completions)]  # 3 calls are the check's

    output = tmp_path / "run"
    with pytest.raises(RewardError, match="tired: reward nan is not a finite number: sample 0"):
        train(tiny_policy, output, {"steps": 4}, [tired])
    assert [path.name for path in RunFolder(output).checkpoints.iterdir()] == ["step-000002"]
    metrics = train(tiny_policy, output, {"steps": 4}, [tired], resume=True)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]


def test_dropped_answers_are_counted(tiny_policy: Path, tmp_path: Path) -> None:
    def first_is_bad(completions: list[str], **_: Any) -> list[float]:
        return [math.nan if text.startswith(" w1") else 1.0 for text in completions]

    metrics = train(tiny_policy, tmp_path / "run", {"reward.on_failure": "drop"}, [first_is_bad])
    assert 0 < metrics[0]["reward/dropped"] < 1
    assert metrics[0]["objective/scores"] == 1.0
    assert metrics[0]["objective/scores_std"] == 0.0


def test_a_step_may_lose_all_its_answers(tiny_policy: Path, tmp_path: Path) -> None:
    calls: list[int] = []

    def often_away(completions: list[str], **_: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 4:  # in the first step
            raise OSError("no connection")
        return share_of_w3(completions)

    first, second = train(tiny_policy, tmp_path / "run", {"reward.on_failure": "drop"}, [often_away])
    assert first["reward/dropped"] == 1.0
    assert first["objective/scores"] is None
    assert first["loss/policy"] is None
    assert second["reward/dropped"] == 0.0


@torch.no_grad()
def check_models(output: Path, config: dict[str, Any]) -> None:
    """Resume the finished run (its weights as keel has them), and compare with what lies in the folder."""
    from keel.run.checkpoint import latest_checkpoint
    from keel.training.state import RunState, restore_run_state

    folder = RunFolder(output)
    setup = build_training_setup(parse(TrainConfig, config), [share_of_w3], PROMPTS, ONE)
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    restore_run_state(setup, RunState(0, 0.0), checkpoint)
    rollouts = setup.respond(99, at_most=6)
    found = setup.actor_critic.analyze(rollouts, temperature=1.0)

    policy = AutoModelForCausalLM.from_pretrained(folder.policy)
    tokenizer = AutoTokenizer.from_pretrained(folder.policy)
    assert tokenizer.encode("w3 w4") == [7, 8]
    assert policy.generation_config.eos_token_id == 2
    saved_at_last_step = AutoModelForCausalLM.from_pretrained(checkpoint.folder("policy"))
    critic = AutoModelForSequenceClassification.from_pretrained(folder.critic) if found.values is not None else None
    for row, prompt in enumerate(rollouts.prompts):
        answer = rollouts.response_tokens[row][rollouts.response_mask[row]]
        tokens = torch.cat([torch.tensor(prompt.tokens), answer]).unsqueeze(0)
        for model in (policy, saved_at_last_step):
            logprobs = model(input_ids=tokens).logits[0].log_softmax(-1)[len(prompt.tokens) - 1 : -1]
            expected = logprobs.gather(1, answer.unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(found.logprobs[row, : len(answer)], expected, rtol=0, atol=1e-5)
        if critic is not None:
            assert critic.config.num_labels == 1
            assert critic.config.pad_token_id is not None
            for t in range(len(answer)):  # transformers gives the value after the last token of a text
                if tokens[0, len(prompt.tokens) + t - 1] != critic.config.pad_token_id:
                    score = critic(input_ids=tokens[:, : len(prompt.tokens) + t]).logits[0, 0]
                    value = score + critic.config.keel_value_offset
                    torch.testing.assert_close(found.values[row, t], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", ["tiny_policy", "tiny_gpt2"])
@pytest.mark.parametrize(
    "changes",
    [
        {"critic.sharing": "separate"},
        {"critic.sharing": "shared"},
        {"algorithm.name": "rloo"},
        {"policy.lora": {"r": 4}, "critic.sharing": "separate"},
        {"policy.lora": {"r": 4}, "critic.sharing": "shared"},
    ],
    ids=["separate", "shared", "no critic", "lora", "lora shared"],
)
def test_plain_transformers_reads_the_models(
    model: str, changes: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder, output = request.getfixturevalue(model), tmp_path / "run"
    changes = changes | {"optim.learning_rate": 1e-2, "steps": 3}
    if model == "tiny_gpt2" and "policy.lora" in changes:
        changes["policy.lora"] = {"r": 4, "target_modules": ["c_attn", "c_fc"]}
    metrics = train(folder, output, changes)
    assert metrics[-1]["objective/kl"] > 0.01  # the weights have moved
    check_models(output, settings(folder, output, changes))


def test_a_policy_without_a_pad_token_has_a_critic_with_one(tiny_policy: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_policy), AutoTokenizer.from_pretrained(tiny_policy)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token = None
    model.save_pretrained(bare)
    tokenizer.save_pretrained(bare)
    for sharing in ("shared", "separate"):
        train(bare, tmp_path / sharing, {"critic.sharing": sharing, "steps": 1})
        critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / sharing / "critic")
        assert critic.config.pad_token_id == 2
        assert json.loads((tmp_path / sharing / "policy" / "config.json").read_text())["pad_token_id"] is None


def test_the_returned_figures_are_the_last_steps(tiny_policy: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    metrics = keel.train(settings(tiny_policy, output), [share_of_w3], PROMPTS).metrics
    assert lines(output / "metrics.jsonl")[-1] == {"step": 2, **metrics}
