"""Dynamic sampling: which groups are replaced, by which prompts, and what happens at the cap."""

from pathlib import Path
from typing import Any

import pytest
import torch

from keel.config import TrainConfig, parse
from keel.data.batches import Rollouts, ScoredRollouts, no_rollouts
from keel.data.prompts import Prompt
from keel.data.replacement import replace_rows
from keel.errors import ConfigError
from keel.rollout.score import score
from keel.rollout.scorers import build_scorers
from keel.training.prompt_order import draw_prompts
from keel.training.resampling import signal_is_missing
from keel.training.trainer import PolicyTrainer

from ..runs import lines, settings, share_of_w3, train

TEXTS = ["w1", "w2", "w3", "w4", "w5", "w6", "w11", "w12"]
EASY = ["w11", "w12"]
GROUPS = {
    "seed": 5,
    "algorithm.name": "grpo",
    "rollout.group_size": 2,
    "rollout.batch_size": 8,
    "rollout.resample_rounds": 4,
    "algorithm.kl_coef": 0.0,
    "log.rollouts_per_step": 8,
}


def easy_or_mixed(prompts: list[str], **_: Any) -> list[float]:
    """Responses to an easy prompt all score 1; of the others, every second response does."""
    return [1.0 if prompt in EASY else float(row % 2) for row, prompt in enumerate(prompts)]


easy_or_mixed.noisy = True  # type: ignore[attr-defined]


def prompts_by_step(folder: Path) -> list[list[str]]:
    rows = lines(folder / "rollouts.jsonl")
    return [[row["prompt"] for row in rows if row["step"] == step][::2] for step in (1, 2)]


def test_the_order_that_the_next_tests_rest_on() -> None:
    drawn = draw_prompts([Prompt(text, text, (), {}) for text in TEXTS], 5, 0, 13)
    assert [prompt.text for prompt in drawn] == (
        ["w3", "w6", "w1", "w12", "w11", "w4", "w5", "w2", "w12", "w1", "w11", "w5", "w4"]
    )


def test_groups_of_equal_scores_are_replaced_until_none_is_left(tiny_policy: Path, tmp_path: Path) -> None:
    """By hand, from the order above. Step 1 draws w3, w6, w1, w12. The next prompt replaces w12, but is w11; the one
    after it is w4. Step 2 draws the four after that, w5, w2, w12, w1; w11 replaces w12, and w5 replaces w11."""
    metrics = train(tiny_policy, tmp_path, GROUPS, [easy_or_mixed], TEXTS)
    assert prompts_by_step(tmp_path) == [["w3", "w6", "w1", "w4"], ["w5", "w2", "w5", "w1"]]
    for line in metrics:
        assert line["resample/rounds"] == 2.0
        assert line["resample/equal_scores"] == pytest.approx(2 / 6)
        assert line["resample/responses"] == 12.0
        assert line["groups/equal_scores"] == 0.0
        assert line["objective/scores"] == 0.5
        assert 12 <= line["resample/tokens"] <= 12 * 6
        assert line["resample/tokens"] > 8 * line["response/length"]  # those of the batch are counted too
        assert line["time/resample_seconds"] > 0


def test_at_the_cap_the_step_continues_with_the_groups_it_has(tiny_policy: Path, tmp_path: Path) -> None:
    """By hand: w11 stays in step 1. Step 2 draws w4, w5, w2, w12; w1 replaces w12."""
    metrics = train(tiny_policy, tmp_path, {**GROUPS, "rollout.resample_rounds": 1}, [easy_or_mixed], TEXTS)
    assert prompts_by_step(tmp_path) == [["w3", "w6", "w1", "w11"], ["w4", "w5", "w2", "w1"]]
    assert [line["groups/equal_scores"] for line in metrics] == [0.25, 0.0]
    assert [line["resample/equal_scores"] for line in metrics] == pytest.approx([2 / 5, 1 / 5])
    assert [line["resample/rounds"] for line in metrics] == [1.0, 1.0]
    assert [line["resample/responses"] for line in metrics] == [10.0, 10.0]


def test_without_equal_scores_the_run_is_that_without_resampling(tiny_policy: Path, tmp_path: Path) -> None:
    both = []
    for rounds in (0, 4):
        changes = {**GROUPS, "rollout.resample_rounds": rounds}
        train(tiny_policy, tmp_path / str(rounds), changes, [easy_or_mixed], TEXTS[:6])
        both.append((tmp_path / str(rounds) / "rollouts.jsonl").read_bytes())
    assert both[0] == both[1]


def test_a_round_draws_other_random_numbers(tiny_policy: Path, tmp_path: Path) -> None:
    """With one prompt, the replaced responses would otherwise be the same again."""
    batches: list[list[str]] = []

    def first_is_bad(completions: list[str], **_: Any) -> list[float]:
        if len(completions) == 8:  # the self-check has fewer
            batches.append(completions)
        return [float(row % 2) if len(batches) == 2 else 0.0 for row in range(len(completions))]

    first_is_bad.noisy = True  # type: ignore[attr-defined]
    train(tiny_policy, tmp_path, {**GROUPS, "steps": 1}, [first_is_bad], TEXTS[:1])
    assert len(batches) == 2
    assert batches[0] != batches[1]


@pytest.mark.parametrize("name", ["ppo", "a2c", "reinforce", "reinforce++"])
def test_refused_where_groups_are_not_compared(name: str, tiny_policy: Path) -> None:
    changes = {"rollout.resample_rounds": 1, "algorithm.name": name}
    with pytest.raises(ConfigError, match=r"compares groups, and .* does not; use rloo or grpo or reinf"):
        parse(TrainConfig, settings(tiny_policy, Path("unused"), changes))


def test_a_loop_that_forgets_to_resample_is_refused(tiny_policy: Path) -> None:
    trainer = PolicyTrainer.from_config(settings(tiny_policy, Path("unused"), GROUPS), [share_of_w3], TEXTS)
    rollouts = trainer.sample()
    with pytest.raises(ConfigError, match="call `resample` between `score` and `compute_targets`"):
        trainer.update(rollouts, [1.0] * 8)
    metrics, _ = trainer.update_weights(trainer.compute_targets(trainer.resample(trainer.score(rollouts))))
    assert metrics["resample/responses"] >= 8


def batch(scores: list[float], texts: list[str], prompt_width: int, width: int) -> ScoredRollouts:
    count = len(texts)
    tokens, mask = torch.full((count, width), 5), torch.ones(count, width, dtype=torch.bool)
    prompts = torch.full((count, prompt_width), 7), torch.ones(count, prompt_width, dtype=torch.bool)
    values = torch.tensor(scores)
    rollouts = Rollouts(
        [Prompt(text, text, (7,) * prompt_width, {}) for text in texts], *prompts, tokens, mask,
        mask.float(), torch.zeros(count, dtype=torch.bool), texts,
    )  # fmt: skip
    kept = torch.ones(count, dtype=torch.bool)
    return ScoredRollouts(rollouts, values, None, {"f": values}, kept, logged={"n": [float(count)]})


def test_rows_are_replaced_in_place_and_padded() -> None:
    merged = replace_rows(batch([1.0, 1.0, 0.0, 1.0], list("abcd"), 1, 3), [1, 0], batch([5.0, 6.0], ["x", "y"], 2, 2))
    rollouts = merged.rollouts
    assert rollouts.texts == ["y", "x", "c", "d"]
    assert merged.scores.tolist() == merged.by_scorer["f"].tolist() == [6.0, 5.0, 0.0, 1.0]
    assert merged.logged == {"n": [4.0, 2.0]}
    assert rollouts.response_mask.int().tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]]
    assert rollouts.prompt_mask.int().tolist() == [[1, 1], [1, 1], [0, 1], [0, 1]]  # prompts are padded on the left
    assert rollouts.response_tokens.tolist() == [[5, 5, 0], [5, 5, 0], [5, 5, 5], [5, 5, 5]]


def test_widths_shrink_when_the_longest_responses_are_replaced() -> None:
    merged = replace_rows(batch([1.0, 1.0], ["a", "b"], 3, 4), [0, 1], batch([5.0, 6.0], ["x", "y"], 2, 2))
    assert merged.rollouts.response_mask.shape == merged.rollouts.prompt_mask.shape == (2, 2)


def test_scores_of_segments_keep_their_tokens() -> None:
    segmented = batch([1.0, 1.0], ["x", "y"], 1, 2)
    segmented = ScoredRollouts(
        segmented.rollouts, segmented.scores, torch.tensor([[0.5, 0.5], [1.0, 0.0]]), {}, segmented.kept
    )
    plain = batch([7.0, 8.0], ["a", "b"], 1, 1)
    merged = replace_rows(
        ScoredRollouts(plain.rollouts, plain.scores, None, {}, plain.kept), [1], replace_one(segmented)
    )
    assert merged.segment_scores is not None
    assert merged.segment_scores.tolist() == [[7.0, 0.0], [0.5, 0.5]]


def replace_one(scored: ScoredRollouts) -> ScoredRollouts:
    """The first row alone."""
    from keel.data.batches import select_rows

    assert scored.segment_scores is not None
    return ScoredRollouts(
        select_rows(scored.rollouts, [0]), scored.scores[:1], scored.segment_scores[:1], {}, scored.kept[:1]
    )


def test_a_process_without_responses_calls_no_function() -> None:
    """Other processes may have some; its share is empty, and so are its scores."""

    def never(completions: list[str]) -> list[float]:
        raise AssertionError

    nothing = score(no_rollouts(torch.device("cpu")), build_scorers([], [never]), None)  # type: ignore[arg-type]
    assert nothing.scores.shape == nothing.kept.shape == (0,)
    merged = replace_rows(
        batch([1.0, 2.0], ["a", "b"], 1, 2),
        [],
        ScoredRollouts(nothing.rollouts, nothing.scores, None, {"f": nothing.scores}, nothing.kept),
    )
    assert merged.scores.tolist() == [1.0, 2.0]
    assert merged.rollouts.texts == ["a", "b"]


def test_a_group_with_a_dropped_response_is_not_replaced() -> None:
    """Sampling again would call a scorer that fails again; the group is left out of the update."""
    scored = batch([1.0, 1.0, 2.0, 2.0, 1.0, 2.0], list("abcdef"), 1, 1)
    kept = torch.tensor([True, True, True, False, True, True])
    scored = ScoredRollouts(scored.rollouts, scored.scores, None, {}, kept)
    assert signal_is_missing(scored, 2).tolist() == [True, False, False]
