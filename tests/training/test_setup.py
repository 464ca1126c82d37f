"""What is built before the loop, and what is refused before anything starts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from keel.config import TrainConfig, parse
from keel.data.prompts import Prompt
from keel.errors import ConfigError
from keel.training.prompt_order import draw_prompts
from keel.training.setup import TrainingSetup, build_training_setup
from keel.world import World

from ..runs import PROMPTS, settings, share_of_w3

ONE = World(0, 1, torch.device("cpu"))
SIX = [Prompt(text, text, (), {}) for text in "abcdef"]


def build(model: Path, changes: dict[str, Any], world: World = ONE) -> TrainingSetup:
    return build_training_setup(
        parse(TrainConfig, settings(model, Path("unused"), changes)), [share_of_w3], PROMPTS, world
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rollout.max_response_tokens": 254},
            "the longest prompt and response have 257 tokens, but the model has only 256 positions",
        ),
        ({"rollout.stop": ["w1 nowhere"]}, "rollout.stop: this model cannot write the stop text 'w1 nowhere'"),
        ({"critic.init": "reward"}, "critic.init: there is no reward model to start from"),
        ({"policy.model": "./nowhere"}, "./nowhere: no such model folder"),
        (
            {"algorithm.name": "a2c", "algorithm.ratio_level": "sequence"},
            "ratio_level: sequence needs a loss with a probability ratio, which a2c lacks; use ppo or grpo",
        ),
        (
            {"algorithm.name": "rloo", "algorithm.clip_target": "weight"},
            "clip_target: weight needs a loss with a probability ratio, which rloo lacks; use ppo or grpo",
        ),
        (
            {"reward.overlong_tokens": 7},
            "reward.overlong_tokens 7 is above rollout.max_response_tokens 6; lower it",
        ),
        (
            {"algorithm.clip_target": "weight", "algorithm.dual_clip": 3.0},
            "dual_clip bounds the clipped loss, and clip_target: weight has none; remove one of the two",
        ),
        ({"reference": "./nowhere"}, "./nowhere: no such model folder"),
    ],
)
def test_refused_before_the_start(tiny_policy: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(tiny_policy, changes)


def test_answers_that_do_not_divide_among_processes(tiny_policy: Path) -> None:
    with pytest.raises(ConfigError, match=r"^rollout.batch_size: 16 .* 3 processes"):
        build(tiny_policy, {}, World(0, 3, torch.device("cpu")))


@pytest.mark.parametrize("first", [0, 6])
def test_a_pass_takes_every_prompt_once(first: int) -> None:
    assert sorted(prompt.text for prompt in draw_prompts(SIX, 0, first, 6)) == list("abcdef")


def test_passes_are_shuffled_anew() -> None:
    passes = [tuple(p.text for p in draw_prompts(SIX, 0, first, 6)) for first in range(0, 30, 6)]
    assert len(set(passes)) > 3
    assert passes[0] != tuple(p.text for p in draw_prompts(SIX, 1, 0, 6))


def test_a_batch_may_reach_over_several_passes() -> None:
    small = [prompt.text for first in (0, 4, 8, 12) for prompt in draw_prompts(SIX, 0, first, 4)]
    assert [prompt.text for prompt in draw_prompts(SIX, 0, 0, 16)] == small


def test_a_group_shares_its_prompt_and_extra_prompts_are_passed_over(tiny_policy: Path) -> None:
    setup = build(tiny_policy, {"rollout.batch_size": 4, "rollout.group_size": 2, "algorithm.name": "grpo"})
    drawn = [prompt.text for prompt in setup.draw_prompts(0, 5)]
    assert [prompt.text for prompt in setup.step_prompts(1)] == [drawn[0], drawn[0], drawn[1], drawn[1]]
    assert [prompt.text for prompt in setup.step_prompts(2, extra=1)] == [drawn[3], drawn[3], drawn[4], drawn[4]]


def test_each_process_has_its_share_of_the_same_answers(tiny_policy: Path) -> None:
    setup = build(tiny_policy, {})
    whole = setup.respond(3).texts
    shares = [replace(setup, world=World(rank, 2, torch.device("cpu"))).respond(3).texts for rank in (0, 1)]
    assert shares[0] + shares[1] == whole
    few = setup.respond(3, at_most=5)
    assert set(few.texts) <= set(whole)
    lengths = [len(prompt.tokens) for prompt in few.prompts]
    assert lengths == sorted(lengths)
    assert len(lengths) == 5
    assert setup.respond(4).texts != whole
    assert setup.respond(3, purpose="reference").texts != whole


def test_the_critic_learns_three_times_as_fast_unless_told_otherwise(tiny_policy: Path) -> None:
    for changes, expected in (({}, [2e-3, 6e-3]), ({"optim.critic_learning_rate": 5e-3}, [2e-3, 5e-3])):
        groups = build(tiny_policy, changes).updater.optimizer.param_groups
        assert sorted({group["lr"] for group in groups}) == pytest.approx(expected)


def test_nobody_learns_in_the_reference(tiny_policy: Path) -> None:
    setup = build(tiny_policy, {})
    assert setup.reference is not None
    trained = {id(p) for group in setup.updater.optimizer.param_groups for p in group["params"]}
    frozen = list(setup.reference.policy.parameters())
    assert not any(p.requires_grad for p in frozen)
    assert not trained & set(map(id, frozen))
    assert build(tiny_policy, {"algorithm.kl_coef": 0.0}).reference is None


@pytest.mark.parametrize(
    ("rewards", "measured"),
    [
        ([{"function": "a.py:f"}], False),
        ([{"model": "runs/reward/model"}], True),
        ([{"function": "a.py:f"}, {"model": "runs/reward/model", "weight": 0.0}], False),
    ],
)
def test_without_a_penalty_the_kl_is_measured_only_for_a_reward_model(
    tiny_policy: Path, rewards: list[dict[str, Any]], measured: bool
) -> None:
    changes = {"algorithm.kl_coef": 0.0, "rewards": rewards}
    assert parse(TrainConfig, settings(tiny_policy, Path("unused"), changes)).measures_kl == measured
