"""Every promise that the self-check keeps is broken here once."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from keel import kernels
from keel.config import DecodingSettings, PromptSettings, TrainConfig, parse
from keel.data.batches import Rollouts
from keel.errors import ConfigError, RewardError
from keel.evaluation.sample import load_policy
from keel.learn.pass_check import logprobs_agree
from keel.learn.update import Updater
from keel.rollout.sampler import sample_rollouts
from keel.training.policy import train_policy
from keel.training.self_check import self_check
from keel.training.setup import TrainingSetup, build_training_setup
from keel.training.trainer import trusts_sampler
from keel.world import World

from ..runs import PROMPTS, settings, share_of_w3, train

ONE = World(0, 1, torch.device("cpu"))


def setup_of(
    model: Path, changes: dict[str, Any] | None = None, scorers: tuple[Callable[..., Any], ...] = (share_of_w3,)
) -> TrainingSetup:
    return build_training_setup(parse(TrainConfig, settings(model, Path("unused"), changes)), scorers, PROMPTS, ONE)


@pytest.fixture
def setup(tiny_policy: Path) -> TrainingSetup:
    return setup_of(tiny_policy)


@pytest.mark.parametrize("model", ["tiny_policy", "tiny_gpt2"])
@pytest.mark.parametrize(
    "changes",
    [
        {"rollout.temperature": 0.7},
        {"critic.sharing": "shared"},
        {"algorithm.name": "grpo", "algorithm.kl_coef": 0.0},
        {"policy.lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]}},
        {"policy.dtype": "bfloat16"},
    ],
    ids=["temperature", "shared critic", "no reference", "lora", "bfloat16"],
)
def test_what_is_right_passes(model: str, changes: dict[str, Any], request: pytest.FixtureRequest) -> None:
    if model == "tiny_gpt2" and "policy.lora" in changes:
        changes = {"policy.lora": {"r": 2, "target_modules": ["c_attn"]}}
    measured = self_check(setup_of(request.getfixturevalue(model), changes))
    exact = 0.05 if "policy.dtype" in changes else 1e-5
    assert measured.pop("check/ratio") == pytest.approx(1.0, abs=exact)
    assert measured.pop("check/kernels") == ("policy.dtype" not in changes and kernels.available())
    assert measured == pytest.approx(dict.fromkeys(measured, 0.0), abs=exact)
    reference = {"check/reference_gap"} if changes.get("algorithm.kl_coef") != 0.0 else set()
    names = {"check/logprob_gap", "check/logprob_gap_mean", "check/padding_gap", "check/clipfrac", "check/score_gap"}
    assert set(measured) == names | reference


def test_it_runs_at_every_start(tiny_policy: Path, tmp_path: Path) -> None:
    def noisy(completions: list[str], numbers: Iterator[int] = count()) -> list[float]:  # noqa: B008
        return [float(next(numbers)) for _ in completions]

    with pytest.raises(RewardError, match="differently the second time"):
        train(tiny_policy, tmp_path / "run", scorers=[noisy])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_check_only_runs_nothing_else(tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(Updater, "update", never)
    measured = train_policy(settings(tiny_policy, tmp_path / "run"), [share_of_w3], PROMPTS, check_only=True)
    assert all(name.startswith("check/") for name in measured)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["policy", "critic"])
def test_dropout_on(setup: TrainingSetup, name: str) -> None:
    getattr(setup.actor_critic, name).train()
    with pytest.raises(ConfigError, match=f"{name}: dropout is on: the {name} is in training mode"):
        self_check(setup)


def test_dropout_inside_one_layer(tiny_gpt2: Path) -> None:
    setup = setup_of(tiny_gpt2)
    setup.actor_critic.policy.transformer.h[1].attn.attn_dropout.train()
    with pytest.raises(ConfigError, match="dropout is on"):
        self_check(setup)


@torch.no_grad()
def test_a_reference_that_is_not_the_start(setup: TrainingSetup, tiny_policy: Path) -> None:
    assert setup.reference is not None
    setup.reference.policy.lm_head.weight.mul_(1.01)
    with pytest.raises(
        ConfigError, match="reference: the reference differs from the initial policy: log-probs differ by"
    ):
        self_check(setup)
    wanted = setup_of(tiny_policy, {"reference": str(tiny_policy)})
    assert wanted.reference is not None
    wanted.reference.policy.lm_head.weight.mul_(1.01)
    assert self_check(wanted)["check/reference_gap"] > 0.001  # asked for, so it is only measured


def sampling(change: Callable[[Rollouts], Rollouts]) -> Callable[..., Rollouts]:
    def changed(*arguments: Any, **settings: Any) -> Rollouts:
        return change(sample_rollouts(*arguments, **settings))

    return changed


def test_a_sampler_at_another_temperature(setup: TrainingSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    def hotter(*arguments: Any, **settings: Any) -> Rollouts:
        return sample_rollouts(*arguments[:-1], temperature=1.1, **settings)

    monkeypatch.setattr("keel.rollout.engine.sample_rollouts", hotter)
    with pytest.raises(ConfigError, match=r"policy: LlamaForCausalLM: sampler and trainer disagree by 0\."):
        self_check(setup)


@torch.no_grad()
def test_weights_that_are_no_numbers(setup: TrainingSetup) -> None:
    setup.actor_critic.policy.lm_head.weight[5, 0] = torch.nan
    with pytest.raises(ConfigError, match="sampler and trainer disagree by nan"):
        self_check(setup)


def test_positions_that_count_the_padding(tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def naive(model: Any, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = model.base_model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state[mask]
        return states

    monkeypatch.setattr("keel.models.actor_critic.token_states", naive)
    with pytest.raises(ConfigError, match="log-probability"):
        self_check(setup_of(tiny_gpt2))


def test_padding_that_leaks(setup: TrainingSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampler and trainer agree; a row alone gives another number."""
    from keel.learn import pass_check as check

    def leaky(actor_critic: Any, rollouts: Rollouts, *arguments: Any, **settings: Any) -> Any:
        found = analyze_all(actor_critic, rollouts, *arguments, **settings)
        return replace(found, logprobs=found.logprobs + (0.01 if len(rollouts.texts) == 1 else 0.0))

    analyze_all = check.analyze_all
    monkeypatch.setattr(check, "analyze_all", leaky)
    with pytest.raises(
        ConfigError, match=r"policy: LlamaForCausalLM: padding changes a token's log-probability by 0\.01"
    ):
        self_check(setup)


def without_ends(rollouts: Rollouts) -> Rollouts:
    return replace(rollouts, response_mask=rollouts.response_mask & (rollouts.response_tokens != 2))


def all_truncated(rollouts: Rollouts) -> Rollouts:
    return replace(rollouts, truncated=torch.ones_like(rollouts.truncated))


@pytest.mark.parametrize("change", [without_ends, all_truncated])
def test_ends_that_are_lost(
    setup: TrainingSetup, monkeypatch: pytest.MonkeyPatch, change: Callable[[Rollouts], Rollouts]
) -> None:
    monkeypatch.setattr("keel.rollout.engine.sample_rollouts", sampling(change))
    with pytest.raises(ConfigError, match="sampler: end tokens and response mask disagree"):
        self_check(setup)


def test_nothing_to_train(setup: TrainingSetup) -> None:
    setup.actor_critic.policy.requires_grad_(False)
    with pytest.raises(ConfigError, match="policy: the policy has no trainable parameter"):
        self_check(setup)


def test_an_update_that_moves_nothing(tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: None)
    with pytest.raises(ConfigError, match=r"the first update changed no weight -> raise optim.learning_rate"):
        train(tiny_policy, tmp_path / "run")


def counting(completions: list[str], numbers: Iterator[int] = count()) -> list[float]:  # noqa: B008
    return [float(next(numbers)) for _ in completions]


def place_in_batch(completions: list[str]) -> list[float]:
    return [float(i) for i in range(len(completions))]


def now_and_then(completions: list[str], numbers: Iterator[int] = count()) -> list[float | None]:  # noqa: B008
    return [None if next(numbers) == 3 else 1.0 for _ in completions]


@pytest.mark.parametrize("function", [counting, place_in_batch, now_and_then])
def test_rewards_that_change(tiny_policy: Path, function: Callable[..., Any]) -> None:
    message = f"scorer {function.__name__}: scores the same responses differently .* declare the scorer noisy"
    with pytest.raises(RewardError, match=message):
        self_check(setup_of(tiny_policy, scorers=(share_of_w3, function)))


def test_rewards_that_are_declared_noisy(tiny_policy: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import random\n\ndef f(completions):\n    return [random.random() for _ in completions]\n")
    self_check(setup_of(tiny_policy, {"rewards": [{"function": f"{file}:f", "noisy": True}]}, scorers=()))
    with pytest.raises(RewardError, match="scorer f: scores the same responses differently"):
        self_check(setup_of(tiny_policy, {"rewards": [{"function": f"{file}:f"}]}, scorers=()))


def test_a_scorer_may_have_nothing_to_say_of_some(tiny_policy: Path) -> None:
    def of_w1(completions: list[str]) -> list[float | None]:
        return [1.0 if "w1" in text else None for text in completions]

    assert self_check(setup_of(tiny_policy, scorers=(share_of_w3, of_w1)))["check/score_gap"] == 0.0


def test_a_scorer_of_segments(tiny_policy: Path) -> None:
    def sizes(segments: list[list[str]]) -> list[list[float]]:
        return [[float(len(part)) for part in parts] for parts in segments]

    assert self_check(setup_of(tiny_policy, {"reward.segments": "w1"}, (sizes,)))["check/score_gap"] == 0.0


def test_scorers_that_never_answer(tiny_policy: Path) -> None:
    def broken(**_: Any) -> list[float]:
        raise OSError("no connection")

    with pytest.raises(RewardError, match="no connection"):
        self_check(setup_of(tiny_policy, scorers=(broken,)))
    with pytest.raises(RewardError, match="rewards: no response could be scored"):
        self_check(setup_of(tiny_policy, {"reward.on_failure": "drop"}, (broken,)))


def test_a_scorer_may_need_more_than_the_beginning_of_a_response(
    tiny_policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check reads short responses; one that scores finished answers only is asked again of full ones."""
    monkeypatch.setattr("keel.training.self_check.PROBE_TOKENS", 2)
    asked: list[int] = []

    def full_only(completion_ids: list[list[int]]) -> list[float]:
        asked.append(max(map(len, completion_ids)))
        if asked[-1] <= 2:
            raise ValueError("not finished")
        return [float(len(ids)) for ids in completion_ids]

    setup = setup_of(tiny_policy, {"rollout.max_response_tokens": 8}, (full_only,))
    setup.end_ids[:] = [-1]  # all responses are as long as they may be
    assert self_check(setup)["check/score_gap"] == 0.0
    assert asked == [2, 8, 8, 8]


@pytest.mark.parametrize(("typical", "passes"), [(0.04, True), (0.3, False)])
def test_bfloat16_is_judged_by_the_mean(
    tiny_policy: Path, monkeypatch: pytest.MonkeyPatch, typical: float, passes: bool
) -> None:
    """One token of 0.38 is what the cached decoding of transformers gives (SmolLM2-135M)."""

    def off(rollouts: Rollouts) -> Rollouts:
        gaps = torch.full_like(rollouts.logprobs, typical)
        gaps[0, 0] = 0.38
        return replace(rollouts, logprobs=rollouts.logprobs + gaps)

    monkeypatch.setattr("keel.rollout.engine.sample_rollouts", sampling(off))
    setup = setup_of(tiny_policy, {"policy.dtype": "bfloat16"})
    if passes:
        measured = self_check(setup)
        assert measured["check/logprob_gap"] > 0.3
        assert measured["check/logprob_gap_mean"] < 0.2
    else:
        with pytest.raises(ConfigError, match=r"sampler and trainer disagree by 0.* -> use dtype float32"):
            self_check(setup)


@pytest.mark.parametrize(("largest", "agrees"), [(0.4, True), (2.5, False), (float("nan"), False)])
def test_in_bfloat16_one_token_may_differ_more_than_the_mean(tiny_policy: Path, largest: float, agrees: bool) -> None:
    setup = setup_of(tiny_policy, {"policy.dtype": "bfloat16"})
    gaps = torch.full((1000,), 0.04)
    gaps[7] = largest
    assert logprobs_agree(gaps, setup.actor_critic) == agrees


@pytest.mark.parametrize(
    ("dtype", "gap", "mean", "elsewhere", "trusted"),
    [
        ("float32", 0.0, 0.0, False, True),
        ("float32", 0.0, 0.0, True, False),
        ("float32", 1e-3, 1e-5, False, False),
        ("float32", math.nan, math.nan, False, False),
        ("bfloat16", 0.1, 0.015, False, True),
        ("bfloat16", 0.1, 0.03, False, False),
    ],
)
def test_the_sampler_is_trusted_on_all_processes_or_on_none(
    tiny_policy: Path, dtype: str, gap: float, mean: float, elsewhere: bool, trusted: bool
) -> None:
    world = Mock(any=lambda differs_here: differs_here or elsewhere)
    setup = replace(setup_of(tiny_policy, {"policy.dtype": dtype}), world=world)
    assert trusts_sampler(setup, {"check/logprob_gap": gap, "check/logprob_gap_mean": mean}) == trusted


def test_it_runs_on_few_rows_of_unlike_lengths(setup: TrainingSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []

    def sampled(*given: Any, **named: Any) -> Rollouts:
        asked.append([len(prompt.tokens) for prompt in given[1]])
        return sample_rollouts(*given, **named)

    monkeypatch.setattr("keel.rollout.engine.sample_rollouts", sampled)
    self_check(setup)
    assert asked == [[1, 3]]


def test_a_verb_that_samples_makes_the_comparison(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`keel sample`, `keel evaluate` and `keel drift` load their models in one place."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "w1 w2"}\n{"prompt": "w3"}\n')
    given = str(tiny_policy), PromptSettings(path=str(prompts)), DecodingSettings(max_response_tokens=6)
    load_policy(*given)

    def off(rollouts: Rollouts) -> Rollouts:
        return replace(rollouts, logprobs=rollouts.logprobs + 0.01)

    monkeypatch.setattr("keel.evaluation.sample.sample_rollouts", sampling(off))
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM: sampler and trainer disagree by 0\.01"):
        load_policy(*given)
