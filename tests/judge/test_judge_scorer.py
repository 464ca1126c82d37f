"""A judge as a scorer: in scoring, training, resuming and evaluating."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from keel.config import EvaluateConfig, RewardSource, TrainConfig, parse
from keel.errors import ConfigError, RewardError
from keel.evaluation.evaluate import evaluate_policies
from keel.judge.judge import USAGE
from keel.rollout.score import score
from keel.rollout.scorers import build_scorers

from ..rollout.answers import words
from ..runs import PROMPTS, contents, lines, settings, train, without_clock
from ..training.test_resume import train_until_killed
from .endpoint import JudgeEndpoint, judge_endpoint

TOKENIZER, THREE = words("good good", "bad", "good bad")


@pytest.fixture
def endpoint() -> Iterator[JudgeEndpoint]:
    with judge_endpoint() as served:
        yield served


def reward(endpoint: JudgeEndpoint, folder: Path, **others: Any) -> dict[str, Any]:
    return {"judge": endpoint.settings(folder, **others).model_dump(mode="json")}


@pytest.mark.parametrize(
    ("mode", "expected"), [("score", [3.0, 1.0, 2.0]), ("pairwise", [1.0, 0.0, 0.5]), ("ranking", [1.0, 0.0, 0.5])]
)
def test_modes(mode: str, expected: list[float], endpoint: JudgeEndpoint, tmp_path: Path) -> None:
    scorers = build_scorers([parse(RewardSource, reward(endpoint, tmp_path, mode=mode))])
    assert [scorer.name for scorer in scorers] == ["critic"]
    assert score(THREE, scorers, TOKENIZER).scores.tolist() == expected
    assert len(endpoint.bodies) == {"score": 3, "pairwise": 6, "ranking": 1}[mode]


def test_the_scale_is_that_of_the_settings(endpoint: JudgeEndpoint, tmp_path: Path) -> None:
    scorers = build_scorers([parse(RewardSource, reward(endpoint, tmp_path, scale=[0, 3]))])
    assert score(THREE, scorers, TOKENIZER).scores.tolist() == [3.0, 1.0, 2.0]
    assert "from 0 (worst) to 3 (best)" in endpoint.bodies[0]["messages"][0]["content"]


@pytest.mark.parametrize("mode", ["score", "pairwise", "ranking"])
def test_failures_stop_or_drop(mode: str, endpoint: JudgeEndpoint, tmp_path: Path) -> None:
    endpoint.change = lambda value: "?" if value in ({"score": 1}, {"better": "B"}) or "ranks" in value else value
    scorers = build_scorers([parse(RewardSource, reward(endpoint, tmp_path, mode=mode))])
    with pytest.raises(RewardError, match=r"critic: the reply is not a JSON object: sample \d \('"):
        score(THREE, scorers, TOKENIZER)
    scored = score(THREE, scorers, TOKENIZER, on_failure="drop")
    expected = {"score": [True, False, True], "pairwise": [False] * 3, "ranking": [False] * 3}
    assert scored.kept.tolist() == expected[mode]


def test_a_dead_server_follows_the_same_rule(endpoint: JudgeEndpoint, tmp_path: Path) -> None:
    dead = reward(endpoint, tmp_path, url="http://127.0.0.1:9/v1", timeout_seconds=0.5)
    scorers = build_scorers([parse(RewardSource, dead)])
    with pytest.raises(RewardError, match=r"no reply within 0\.5 s"):
        score(THREE, scorers, TOKENIZER)
    scored = score(THREE, scorers, TOKENIZER, on_failure="drop")
    assert scored.kept.tolist() == [False] * 3
    assert "no reply" in scored.failures["critic"]


def test_a_single_response_has_no_comparison(endpoint: JudgeEndpoint, tmp_path: Path) -> None:
    scorers = build_scorers([parse(RewardSource, reward(endpoint, tmp_path, mode="ranking"))])
    tokenizer, one = words("good")
    with pytest.raises(RewardError, match="no scorer had a score"):
        score(one, scorers, tokenizer)


@pytest.mark.parametrize(("mode", "questions"), [("pairwise", 4), ("ranking", 2)])
def test_adjacent_groups_of_one_prompt_stay_apart(
    mode: str, questions: int, endpoint: JudgeEndpoint, tmp_path: Path
) -> None:
    # Of all four, "bad" would beat none, and "good" one of three.
    scorers = build_scorers([parse(RewardSource, reward(endpoint, tmp_path, mode=mode))], group_size=2)
    tokenizer, four = words("good", "bad", "good good", "good")
    assert score(four, scorers, tokenizer).scores.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert len(endpoint.bodies) == questions


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["score", "ranking"])
def test_a_run_learns_from_a_judge_and_counts_its_cost(
    mode: str, endpoint: JudgeEndpoint, tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEEL_JUDGE_KEY", "sk-s3cret")
    endpoint.word = "w3"
    rewards = [reward(endpoint, tmp_path, mode=mode, input_price=1.0, output_price=5.0)]
    changes = {"rewards": rewards, "rollout.group_size": 4, "algorithm.name": "grpo", "steps": 2}
    metrics = train(tiny_policy, tmp_path / "run", changes, [])
    (name,) = {key.removeprefix("rewards/") for key in metrics[0] if key.startswith("rewards/")}
    for line in metrics:
        counts = {key: line[f"judge_{key}/{name}"] for key in USAGE}
        assert counts["input_tokens"] == 100 * counts["requests"]
        assert counts["cost"] == pytest.approx((100 * 1 + 20 * 5) * counts["requests"] / 1e6)
    requests = sum(line[f"judge_requests/{name}"] for line in metrics)
    assert requests == len(endpoint.bodies)
    assert 0 < metrics[0]["objective/scores"] <= 10
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "config.yaml" for path in files)
    assert all(b"s3cret" not in path.read_bytes() for path in files)


@pytest.mark.slow
def test_a_resumed_run_repeats_its_steps_from_the_cache(
    endpoint: JudgeEndpoint, tiny_policy: Path, tmp_path: Path
) -> None:
    """A judge at temperature 0 may still vary. The cache makes a repeated step the same step."""
    endpoint.word, numbers = "w3", iter(range(10**6))
    endpoint.change = lambda value: {"score": 1 + next(numbers) % 10}  # never the same verdict twice
    changes = {"rewards": [reward(endpoint, tmp_path)], "steps": 4, "checkpoint.every": 2}
    train_until_killed(tiny_policy, tmp_path / "resumed", changes, step=4)
    first = lines(tmp_path / "resumed" / "metrics.jsonl")
    found = train(tiny_policy, tmp_path / "resumed", changes, resume=True)
    assert found[2]["judge_requests/critic"] == 0
    assert found[2]["objective/scores"] == first[2]["objective/scores"]
    straight = train(tiny_policy, tmp_path / "straight", changes)

    def without_counts(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
        kept = without_clock(metrics)
        return [{key: value for key, value in line.items() if not key.startswith("judge_")} for line in kept]

    assert without_counts(straight) == without_counts(found)
    weights = "policy/model.safetensors"
    assert contents(tmp_path / "straight")[weights] == contents(tmp_path / "resumed")[weights]


def test_a_changed_rubric_is_not_resumed(endpoint: JudgeEndpoint, tiny_policy: Path, tmp_path: Path) -> None:
    changes = {"rewards": [reward(endpoint, tmp_path)], "steps": 2, "checkpoint.every": 1}
    train_until_killed(tiny_policy, tmp_path / "run", changes, step=2)
    (tmp_path / "rubric.txt").write_text("Something else.")
    with pytest.raises(ConfigError, match=r"rubric\.txt: has changed since the run began"):
        train(tiny_policy, tmp_path / "run", changes, resume=True)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"judge": {"mode": "pairwise"}}, "needs 2 to 26 responses to a prompt"),
        ({"judge": {"mode": "ranking"}, "group": 4, "every": 1}, "the one response to a held-out prompt"),
        ({"judge": {"scale": [5, 5]}}, "must end above its start"),
        ({"judge": {"rubric": None}}, "rubric"),
        ({"timeout_seconds": 5}, "set that"),
        ({"url": "http://host"}, "exactly one of model, function, url, judge"),
        ({"chat_template": "chatml"}, "chat_template needs model"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], what: str, tmp_path: Path) -> None:
    judge = {"url": "http://h/v1", "model": "m", "rubric": "r.txt"} | changes.pop("judge", {})
    group, every = changes.pop("group", 1), changes.pop("every", 0)
    values = settings(tmp_path, tmp_path / "run", {"rewards": [{"judge": judge, **changes}]})
    values["rollout"]["group_size"] = group
    values["evaluate"] = {"every": every, "prompts": "p.jsonl"}
    with pytest.raises(ConfigError, match=what):
        parse(TrainConfig, values)


# ---- evaluation ------------------------------------------------------------------------------------------------------


def test_an_evaluation_decides_by_a_judge(endpoint: JudgeEndpoint, tiny_policy: Path, tmp_path: Path) -> None:
    endpoint.word = "w3"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    values = {
        "policy": str(tiny_policy),
        "against": str(tiny_policy),
        "prompts": {"path": str(prompts)},
        "rewards": [{**reward(endpoint, tmp_path, input_price=1.0), "name": "critic"}],
        "judge": "critic",
        "sampling": {"num_responses": 4, "max_response_tokens": 8},
    }
    metrics = evaluate_policies(parse(EvaluateConfig, values))
    assert 1 <= metrics["policy"]["rewards/critic"] <= 10
    assert 0 < metrics["win_rate"] < 1
    usage = metrics["judges"]["critic"]
    assert usage["requests"] == len(endpoint.bodies)
    assert usage["cost"] == pytest.approx(usage["requests"] * 100 / 1e6)
    values["rewards"] = [reward(endpoint, tmp_path, mode="pairwise")]
    with pytest.raises(ConfigError, match=r"has no score for a single one -> .*keel rank"):
        evaluate_policies(parse(EvaluateConfig, values | {"judge": None}))


def test_scores_are_numbers_of_the_run(endpoint: JudgeEndpoint, tmp_path: Path) -> None:
    scorers = build_scorers([parse(RewardSource, reward(endpoint, tmp_path) | {"weight": 0.5})])
    assert torch.equal(score(THREE, scorers, TOKENIZER).scores, torch.tensor([1.5, 0.5, 1.0]))
