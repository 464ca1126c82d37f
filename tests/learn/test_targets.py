"""What the update aims at, worked out by hand."""

from dataclasses import replace
from math import log
from typing import Any

import pytest
import torch

from keel.core.rewards import place_scores
from keel.data.batches import TrainingBatch
from keel.learn.algorithms import ALGORITHMS
from keel.learn.targets import Targets, build_targets
from keel.models.actor_critic import ValueUnits

from .tables import ONE, Table, rollouts, scored, target_settings

POLICY = [log(0.5), log(0.25), log(0.25)]
REFERENCE = [log(0.25), log(0.25), log(0.5)]
LN2 = 0.6931472


def targets(*args: Any, **settings: Any) -> TrainingBatch:
    return all_targets(*args, **settings).batch


def all_targets(
    responses: list[list[int]],
    token_scores: list[list[float]] | list[float],
    name: str = "ppo",
    values: list[float] | None = None,
    reference: list[float] | None = REFERENCE,
    kl_coef: float = 0.1,
    truncated: list[bool] | None = None,
    kept: list[bool] | None = None,
    units: ValueUnits | None = None,
    **settings: Any,
) -> Targets:
    """Scores are one for each token, or one for each response (on its last token)."""
    answers = rollouts(responses, truncated)
    given = torch.tensor(token_scores)
    placed = place_scores(given, answers.response_mask) if given.dim() == 1 else given
    policy = Table(POLICY, values)
    policy.value_units = units or policy.value_units
    return build_targets(
        scored(answers, placed.sum(1).tolist(), kept),
        placed,
        policy,  # type: ignore[arg-type]
        None if reference is None else Table(reference),  # type: ignore[arg-type]
        ALGORITHMS[name],
        target_settings(**settings),
        kl_coef,
        ONE,
    )


def test_the_kl_is_taken_off_where_the_policy_is_above_the_reference() -> None:
    batch = targets([[0, 1, 2]], [2.0])
    assert batch.logprobs[0].tolist() == pytest.approx(POLICY)
    assert batch.ref_logprobs[0].tolist() == pytest.approx(REFERENCE)
    assert batch.rewards[0].tolist() == pytest.approx([-0.1 * LN2, 0.0, 2.0 + 0.1 * LN2])


@pytest.mark.parametrize(
    ("estimator", "kl"),
    [("k1", [LN2, 0, -LN2]), ("k2", [LN2**2 / 2, 0, LN2**2 / 2]), ("k3", [0.5 - 1 + LN2, 0, 2 - 1 - LN2])],
)
def test_estimators_of_the_kl_in_the_reward(estimator: str, kl: list[float]) -> None:
    batch = targets([[0, 1, 2]], [0.0], kl_coef=1.0, kl_estimator=estimator)
    assert batch.rewards[0].tolist() == pytest.approx([-value for value in kl], abs=1e-6)


def test_a_kl_in_the_loss_leaves_the_rewards_pure() -> None:
    batch = targets([[0, 1, 2]], [2.0], kl_in="loss", kl_estimator="k2")
    assert batch.rewards[0].tolist() == [0.0, 0.0, 2.0]
    assert batch.ref_logprobs[0].tolist() == pytest.approx(REFERENCE)


def test_without_a_reference_there_is_no_kl() -> None:
    batch = targets([[0, 1, 2]], [2.0], reference=None)
    assert batch.rewards[0].tolist() == [0.0, 0.0, 2.0]
    torch.testing.assert_close(batch.ref_logprobs, batch.logprobs, rtol=0, atol=0)


def test_all_logprobs_are_at_the_sampling_temperature() -> None:
    """p^2 / sum p^2 at temperature 1/2: 4/6, 1/6, 1/6 and 1/6, 1/6, 4/6."""
    batch = targets([[0, 1, 2]], [0.0], temperature=0.5, kl_coef=1.0)
    assert batch.logprobs[0].exp().tolist() == pytest.approx([4 / 6, 1 / 6, 1 / 6])
    assert batch.ref_logprobs[0].exp().tolist() == pytest.approx([1 / 6, 1 / 6, 4 / 6])


VALUES = [0.5, 0.4, -0.1, 0.2, 0.7]
SCORES = [[0.1, -0.2, 0.3, 1.0]]


@pytest.mark.parametrize(
    ("settings", "advantages", "shift"),
    [
        ({}, [-0.2092375, -0.22025, 0.505, -0.1], 0.9),
        ({"gae_lambda": 0.0}, [0.0, -0.7, 0.6, -0.1], 0.9),
        ({"gae_lambda": 1.0}, [-0.2, -0.2, 0.5, -0.1], 0.9),
        ({"truncation": "bootstrap", "truncated": [True]}, [1.1625625, 1.22375, 2.025, 1.5], 0.0),
        ({"truncation": "bootstrap", "truncated": [False]}, [-0.2092375, -0.22025, 0.505, -0.1], 0.9),
        ({"truncation": "terminal", "truncated": [True]}, [-0.2092375, -0.22025, 0.505, -0.1], 0.9),
    ],
)
@pytest.mark.parametrize("name", ["ppo", "a2c"])
def test_advantages_and_returns_with_a_critic(
    name: str, settings: dict[str, Any], advantages: list[float], shift: float
) -> None:
    """Rewards to go 1.2, 1.1, 1.3, 1.0 (and 0.7 more where the critic follows the cut) are above the values by `shift`
    on average: all values rise by it before the advantages are taken. Where the value after the cut would rise as
    well there is no such shift."""
    found = all_targets([[0, 0, 0, 0]], SCORES, name, VALUES, None, **settings)
    batch, values = found.batch, [value + shift for value in VALUES]
    assert batch.advantages[0].tolist() == pytest.approx(advantages, abs=1e-6)
    assert batch.values[0].tolist() == pytest.approx(values[:4])
    assert batch.returns[0].tolist() == pytest.approx([a + v for a, v in zip(advantages, values, strict=False)])
    assert found.value_units.offset == pytest.approx(shift)


@pytest.mark.parametrize("cut", [0, 1, 3, 4])
def test_the_offset_does_not_run_away_where_values_follow_the_cut(cut: int) -> None:
    """Four responses of score 2, `cut` of them bootstrapped, 200 batches at gamma 1: the offset stays the return of
    those that end; with none that ends nothing is known of it."""
    units = ValueUnits()
    for _ in range(200):
        found = all_targets(
            [[0, 1]] * 4,
            [2.0] * 4,
            values=[0.0] * 3,
            reference=None,
            units=units,
            truncation="bootstrap",
            truncated=[i < cut for i in range(4)],
        )
        units = found.value_units
    assert units.offset == pytest.approx(0.0 if cut == 4 else 2.0)


@pytest.mark.parametrize("offset", [0.0, 5.0, -50.0])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("values", [[0.0] * 5, VALUES])
def test_a_constant_and_a_factor_of_the_reward_change_no_advantage(
    offset: float, scale: float, values: list[float]
) -> None:
    """Responses of different length with scores 1, 2 and 4; a critic that is new, and one that has learned."""

    def advantages(offset: float, scale: float) -> list[float]:
        scores = [offset + scale * score for score in (1.0, 2.0, 4.0)]
        own = [scale * value for value in values]
        given = {"kl_coef": 0.1 * scale, "whiten_advantages": True}
        return targets([[0, 0, 0], [1], [0, 2]], scores, "ppo", own, REFERENCE, **given).advantages.flatten().tolist()

    plain = advantages(0.0, 1.0)
    assert max(map(abs, plain)) > 1
    assert advantages(offset, scale) == pytest.approx(plain, abs=2e-3 if abs(offset) > 5 and scale < 1 else 3e-4)


def test_the_first_spread_of_the_returns_becomes_the_unit_of_a_new_head() -> None:
    """Returns 1, 1, 3: mean 5/3, variance 8/9."""
    units = all_targets([[0, 0], [0]], [1.0, 3.0], "ppo", [0.0] * 3, None).value_units
    assert units.deviation == units.gain == pytest.approx((8 / 9) ** 0.5)
    assert units.offset == pytest.approx(5 / 3)
    learned = all_targets([[0, 0], [0]], [1.0, 3.0], "ppo", [0.5, -0.5, 0.0], None).value_units
    assert (learned.gain, learned.deviation) == (1.0, pytest.approx((8 / 9) ** 0.5))
    assert all_targets([[0, 0], [0]], [7.0, 7.0], "ppo", [0.0] * 3, None).value_units == ValueUnits(offset=7.0)


@pytest.mark.parametrize(
    ("name", "group_size"), [("ppo", 1), ("a2c", 1), ("reinforce", 1), ("rloo", 2), ("grpo", 2), ("grpo", 4)]
)
@pytest.mark.parametrize("score", [1.0, -0.3, 1e-4, 12345.678])
def test_equal_scores_give_exactly_no_advantage(name: str, group_size: int, score: float) -> None:
    """The policy is its reference but for rounding of the log-probs, as between a decoding step and a full pass."""
    near = [log(0.5) + 3e-6, log(0.25) - 4e-6, log(0.25)]
    values = [0.0] * 4 if name in ("ppo", "a2c") else None
    responses = [[0, 0, 1], [1], [2, 0], [1, 1]]
    scores = [score * (1 + 1e-7 * i) for i in range(4)]
    settings = {"group_size": group_size, "whiten_advantages": True}
    batch = targets(responses, scores, name, values, near, **settings)
    assert not batch.advantages.any()
    assert torch.equal(batch.returns[batch.response_mask], batch.values[batch.response_mask]) or values is None


@pytest.mark.parametrize("kl_coef", [0.0002, 0.2])
def test_the_kl_of_equal_scores_keeps_the_weight_of_kl_coef(kl_coef: float) -> None:
    """Groups of two with KL ln 2 and -ln 2. Scores 1, 1: no deviation anywhere, so nothing divides the KL. Beside a
    group with scores 1, 3 of deviation sqrt 2: the usual one is 1, a tenth of it divides the KL of the equal group,
    and sqrt 2 that of the other."""
    alone = targets([[0], [2]], [1.0, 1.0], "grpo", kl_coef=kl_coef, group_size=2).advantages.flatten()
    assert alone.tolist() == pytest.approx([-kl_coef * LN2, kl_coef * LN2])
    both = targets([[0], [2], [0], [2]], [1.0, 1.0, 1.0, 3.0], "grpo", kl_coef=kl_coef, group_size=2)
    equal, apart = 10 * kl_coef * LN2, 0.7071064 + kl_coef * LN2 / 1.4142136
    assert both.advantages.flatten().tolist() == pytest.approx([-equal, equal, -apart, apart], rel=1e-5)


@pytest.mark.parametrize(("size", "share"), [(0.0, 1.0), (1e-3, 0.0199960), (0.05, 0.7071068), (10.0, 0.9999875)])
def test_the_step_is_shorter_where_scores_differ_by_less_than_kl_coef(size: float, share: float) -> None:
    """Deviation of the scores `size`, kl_coef 0.1, KL 0: d / sqrt(d^2 + 0.05^2)."""

    def step_scale(**settings: Any) -> float:
        return all_targets([[0], [0]], [1 + size, 1 - size], "reinforce", None, None, **settings).step_scale

    assert step_scale(kl_coef=0.1) == pytest.approx(share, rel=1e-4)
    assert step_scale(kl_in="loss", kl_estimator="k2") == step_scale(kl_coef=0.0) == 1.0


@pytest.mark.parametrize("token", [0, 2])
def test_a_policy_that_is_far_away_takes_full_steps_back(token: int) -> None:
    """Equal scores; the estimate of the KL is ln 2 or, by chance, -ln 2: d = kl_coef ln 2 against 0.5 kl_coef."""
    found = all_targets([[token], [token]], [1.0, 1.0], "reinforce", kl_coef=0.1)
    assert found.step_scale == pytest.approx(0.6931472 / (0.6931472**2 + 0.25) ** 0.5)


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_what_differs_between_groups_alone_is_no_signal(name: str) -> None:
    """One prompt is easy and one is hard. Within groups nothing differs, and the KL of ln 2 is all there is."""
    scores = [1.0, 1.0, 0.0, 0.0]
    found = all_targets([[0], [0], [0], [0]], scores, name, kl_coef=0.1, group_size=2)
    assert found.step_scale == pytest.approx(0.6931472 / (0.6931472**2 + 0.25) ** 0.5)


def test_large_scores_of_a_group_keep_their_advantages() -> None:
    """Scores around 2,000,000: the same as those around 2."""
    small, large = (
        targets([[0]] * 4, [size * score for score in (2.0, 2.1, 1.9, 2.05)], "grpo", None, None, group_size=4)
        for size in (1.0, 1e6)
    )
    assert bool((small.advantages != 0).all())
    torch.testing.assert_close(large.advantages, small.advantages, rtol=1e-4, atol=1e-5)


def test_the_unit_of_the_value_loss_grows_with_the_returns() -> None:
    """Deviation 1 at first; the gain stays with the head that learned with it."""
    first = ValueUnits(offset=0.0, gain=1.0, deviation=1.0)
    model = Table(POLICY, [0.0] * 2)
    model.value_units = first
    for scores, deviation in (([5.0, -5.0], 5.0), ([0.1, -0.1], 1.0)):
        answers = rollouts([[0], [0]])
        given = torch.tensor(scores)
        found = build_targets(
            scored(answers, scores), place_scores(given, answers.response_mask), model, None, ALGORITHMS["ppo"],  # type: ignore[arg-type]
            target_settings(), 0.1, ONE,
        )  # fmt: skip
        assert (found.value_units.deviation, found.value_units.gain) == (deviation, 1.0)


def test_a_truncated_row_is_bootstrapped_at_its_own_end() -> None:
    """Returns 1.0 + 0.4 against V = 0.5, and 1.2, 1.1, 1.3, 1.0: the values are 0.9 too low on average."""
    batch = targets([[0], [0, 0, 0, 0]], [[1.0, 0, 0, 0], SCORES[0]], "ppo", VALUES, None, truncated=[True, False],
                    truncation="bootstrap")  # fmt: skip
    assert batch.advantages[0].tolist() == pytest.approx([1.0 + 0.4 - 0.5, 0, 0, 0])  # V after one token is 0.4
    assert batch.advantages[1].tolist() == pytest.approx([-0.2092375, -0.22025, 0.505, -0.1], abs=1e-6)


def test_reinforce_has_rewards_to_go() -> None:
    batch = targets([[0, 0, 0, 0]], SCORES, "reinforce", None, None, gamma=0.5)
    assert batch.advantages[0].tolist() == pytest.approx([0.2, 0.2, 0.8, 1.0])


@pytest.mark.parametrize(
    ("name", "settings", "size"),
    [("rloo", {}, 2 / 3), ("grpo", {}, 0.8660239), ("grpo", {"normalize_std": False}, 0.5)],
)
def test_groups(name: str, settings: dict[str, Any], size: float) -> None:
    """Scores 1, 0, 0, 1; each answer's advantage stands on all its tokens. Whitening is not for groups."""
    responses = [[0, 0], [0], [0], [0, 0]]
    batch = targets(responses, [1.0, 0.0, 0.0, 1.0], name, None, None, group_size=4, whiten_advantages=True, **settings)
    assert batch.advantages.flatten().tolist() == pytest.approx([size, size, -size, 0, -size, 0, size, size])


def test_reinforce_plus_plus_whitens_rewards_to_go() -> None:
    """Returns 2, 4 (over the counted tokens 2, 2, 4): mean 8/3, variance 8/9."""
    batch = targets([[0, 0], [1]], [2.0, 4.0], "reinforce++", None, None, whiten_advantages=True)
    assert batch.advantages.flatten().tolist() == pytest.approx([-(0.5**0.5), -(0.5**0.5), 2**0.5, 0], abs=1e-6)


def test_a_group_baseline_whitened_over_the_batch() -> None:
    """Groups 3, 1 and 10, 10 of one token each: 1, -1, 0, 0, of mean 0 and variance 1/2. Equal scores give exact 0."""
    arguments: tuple[Any, ...] = (
        [[0], [1], [0], [1]],
        [3.0, 1.0, 10.0, 10.0],
        "reinforce++_base",
        None,
        None,
    )
    plain = targets(*arguments, group_size=2, whiten_advantages=False)
    assert plain.advantages.flatten().tolist() == [1.0, -1.0, 0.0, 0.0]
    whitened = targets(*arguments, group_size=2, whiten_advantages=True)
    assert whitened.advantages.flatten().tolist() == pytest.approx([2**0.5, -(2**0.5), 0, 0], abs=1e-6)


def test_groups_compare_the_kl_as_well() -> None:
    """Equal scores; the answer that went away from the reference is worse by its KL."""
    batch = targets([[0], [1]], [1.0, 1.0], "rloo", kl_coef=0.5, group_size=2)
    assert batch.advantages.flatten().tolist() == pytest.approx([-0.5 * LN2, 0.5 * LN2])


def test_whitened_advantages() -> None:
    """1, 2, 3, 4, 5 over the counted tokens, in rows of unequal length."""
    responses, scores = [[0, 0], [0], [0, 0]], [[1.0, 2.0], [3.0, 0.0], [4.0, 5.0]]
    batch = targets(responses, scores, "reinforce", None, None, gamma=0.0, whiten_advantages=True)
    expected = [-1.41421356, -0.70710678, 0.0, 0.0, 0.70710678, 1.41421356]
    assert batch.advantages.flatten().tolist() == pytest.approx(expected, abs=1e-6)
    assert batch.returns.flatten().tolist() == pytest.approx([1, 2, 3, 0, 4, 5])


@pytest.mark.parametrize(
    ("name", "group_size", "counted"),
    [("ppo", 2, [True, False, True, True]), ("rloo", 2, [False, False, True, True]), ("grpo", 4, [False] * 4)],
)
def test_a_dropped_answer_leaves_the_mask_and_so_does_its_group(
    name: str, group_size: int, counted: list[bool]
) -> None:
    kept = [True, False, True, True]
    values = [0.0] * 3 if name == "ppo" else None
    settings = {"group_size": group_size, "whiten_advantages": True, "kept": kept}
    found = [
        targets([[0, 0], [0, 1], [0], [1, 0]], [1.0, score, 3.0, 5.0], name, values, **settings) for score in (0.0, 1e6)
    ]
    for batch in found:
        assert batch.response_mask.any(1).tolist() == counted
        assert batch.response_mask.sum() == sum(n for n, here in zip([2, 2, 1, 2], counted, strict=True) if here)
        assert not batch.advantages[~batch.response_mask].any()
    torch.testing.assert_close(found[0].advantages, found[1].advantages, rtol=0, atol=0)  # whatever was said of it


@pytest.mark.parametrize("budget", [1, 4, 100])
def test_micro_batches_change_nothing(budget: int) -> None:
    responses = [[0, 1], [2], [0, 0, 1], [1]]
    batch = targets(responses, [1.0, 2.0, 3.0, 4.0], "ppo", VALUES, microbatch_tokens=budget)
    whole = targets(responses, [1.0, 2.0, 3.0, 4.0], "ppo", VALUES, microbatch_tokens=10**9)
    for name in ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"):
        torch.testing.assert_close(getattr(batch, name), getattr(whole, name), rtol=0, atol=0)


def corrections(sampler_logprobs: list[float], cap: float | None) -> list[float]:
    """The weights of three tokens of probability 1/2, 1/4, 1/4, which the sampler drew with other ones."""
    answers = replace(rollouts([[0, 1, 2]]), logprobs=torch.tensor([sampler_logprobs]))
    built = build_targets(
        scored(answers, [1.0]),
        torch.tensor([[0.0, 0.0, 1.0]]),
        Table(POLICY),  # type: ignore[arg-type]
        None,
        ALGORITHMS["reinforce"],
        target_settings(correction_cap=cap),
        0.0,
        ONE,
    )
    return built.batch.weights[0].tolist()


def test_the_correction_is_the_ratio_of_the_trainer_to_the_sampler() -> None:
    assert corrections([log(0.4), log(0.5), log(0.05)], cap=2.0) == pytest.approx([1.25, 0.5, 2.0])
    assert corrections([log(0.4), log(0.5), log(0.05)], cap=None) == [1.0, 1.0, 1.0]


def test_rounding_is_not_corrected() -> None:
    """Log-probs within 1e-4 have a weight of exactly 1, so that float32 runs keep their bits."""
    assert corrections([value + 9e-5 for value in POLICY], cap=2.0) == [1.0, 1.0, 1.0]
    assert corrections([value - 2e-4 for value in POLICY], cap=2.0) == pytest.approx([1.0002] * 3, abs=1e-6)
