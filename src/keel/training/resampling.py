"""Dynamic sampling: groups of equal scores, which teach nothing, are replaced by groups of new prompts.

Yu et al. 2025 (DAPO, arXiv 2503.14476), equation 11: groups whose responses are all right or all wrong are left out,
and sampling continues until the batch is full. Here it also ends after `rollout.resample_rounds` rounds.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from keel.core.advantages import equal_groups
from keel.data.batches import Resampling, Rollouts, ScoredRollouts
from keel.data.prompts import Prompt
from keel.data.replacement import replace_rows
from keel.rollout.engine import Draws
from keel.training.setup import TrainingSetup
from keel.world import World

SampleRound = Callable[[int, Sequence[Prompt], Draws], Rollouts]
"""Samples the responses of a round: its number, from 1 on, the prompts and the random numbers."""


def resample_groups(
    setup: TrainingSetup,
    scored: ScoredRollouts,
    step: int,
    next_prompt: int,
    sample: SampleRound,
    score: Callable[[Rollouts], ScoredRollouts],
) -> ScoredRollouts:
    """Replace the groups of equal scores, in rounds, until none is left or `rollout.resample_rounds` are done.

    The result depends neither on the number of processes nor on where a run was resumed: the missing groups of all
    processes are counted through, and the n-th one gets the n-th new prompt and the random numbers of its rows.

    Args:
        next_prompt: position of the first new prompt, in the order of the run.
    """
    config, world = setup.config, setup.world
    group_size, done = config.rollout.group_size or 1, Resampling()
    for number in range(1, config.rollout.resample_rounds + 1):
        missing = world.gather(signal_is_missing(scored, group_size)).nonzero().squeeze(1).tolist()
        if not missing:
            break
        drawn = setup.draw_prompts(next_prompt + done.num_groups, len(missing))
        first, last = _local_groups(scored, group_size, world)
        local = [(group, prompt) for group, prompt in zip(missing, drawn, strict=True) if first <= group < last]
        rows = [group * group_size + place for group, _ in local for place in range(group_size)]
        prompts = [prompt for _, prompt in local for _ in range(group_size)]
        draws = Draws((config.seed, "sample", step, number), config.rollout.batch_size, rows)
        new = score(sample(number, prompts, draws))
        places = [row - first * group_size for row in rows]
        num_tokens = done.num_tokens + int(scored.rollouts.lengths[places].sum())
        scored = replace_rows(scored, places, new)
        done = Resampling(number, done.num_groups + len(missing), num_tokens)
    return replace(scored, resampling=done)


def signal_is_missing(scored: ScoredRollouts, group_size: int) -> Tensor:
    """Return whether all responses of a group have scores, and these are equal up to rounding. [B / G] bool"""
    return equal_groups(scored.scores, group_size) & scored.kept.view(-1, group_size).all(1)


def _local_groups(scored: ScoredRollouts, group_size: int, world: World) -> tuple[int, int]:
    """Return the first of this process's groups, among those of all processes, and the one after its last."""
    count = len(scored.kept) // group_size
    return world.rank * count, (world.rank + 1) * count


def resampling_metrics(setup: TrainingSetup, scored: ScoredRollouts) -> dict[str, float]:
    """Return what dynamic sampling did in a step, over all processes; nothing if it is off."""
    done, group_size = scored.resampling, setup.config.rollout.group_size or 1
    if done is None or not setup.config.rollout.resample_rounds:
        return {}
    num_tokens = scored.rollouts.lengths.sum().double() + done.num_tokens
    equal = signal_is_missing(scored, group_size).sum().double()
    num_groups = setup.config.rollout.batch_size // group_size + done.num_groups
    return {
        "resample/rounds": float(done.rounds),
        "resample/equal_scores": (float(setup.world.sum(equal)) + done.num_groups) / num_groups,
        "resample/responses": float(num_groups * group_size),
        "resample/tokens": float(setup.world.sum(num_tokens)),
    }
