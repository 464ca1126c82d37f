"""The table of algorithms: one row for each value of `algorithm.name`, without torch, for settings and doctor.

`keel.learn.algorithms` adds the functions that compute advantages and losses.
"""

from dataclasses import dataclass
from typing import Literal

DEFAULT_DEVIATION_SETTING = "whiten_advantages"


@dataclass(frozen=True)
class AlgorithmTraits:
    """What distinguishes an algorithm from the others, and its defaults."""

    advantages: Literal["gae", "returns", "rloo", "grpo", "group_mean"]
    """Estimator of the advantages, a key of `ADVANTAGES` in `keel.learn.algorithms`"""
    clips_ratio: bool
    """Whether the loss clips the ratio to the policy that sampled; without it a batch allows only one pass"""
    needs_critic: bool
    compares_groups: bool
    """Whether advantages are relative to the other responses to the same prompt"""
    deviation_setting: str | None
    """Setting in `algorithm` under which the advantages have unit variance; None: they keep the scale of the scores"""
    update_epochs: int
    """Default passes over a batch"""
    minibatches: int
    """Default number of minibatches in a batch"""
    group_size: int
    """Default number of responses to each prompt"""

    @property
    def whitens(self) -> bool:
        """Whether `whiten_advantages` applies: rloo and grpo scale within groups, or not at all."""
        return self.deviation_setting == DEFAULT_DEVIATION_SETTING


ALGORITHM_TRAITS = {
    "ppo": AlgorithmTraits(
        advantages="gae",
        clips_ratio=True,
        needs_critic=True,
        compares_groups=False,
        deviation_setting=DEFAULT_DEVIATION_SETTING,
        update_epochs=4,
        minibatches=4,
        group_size=1,
    ),
    # A2C is PPO with one epoch and one minibatch (Huang et al. 2022, arXiv 2205.09123).
    "a2c": AlgorithmTraits(
        advantages="gae",
        clips_ratio=False,
        needs_critic=True,
        compares_groups=False,
        deviation_setting=DEFAULT_DEVIATION_SETTING,
        update_epochs=1,
        minibatches=1,
        group_size=1,
    ),
    "reinforce": AlgorithmTraits(
        advantages="returns",
        clips_ratio=False,
        needs_critic=False,
        compares_groups=False,
        deviation_setting=DEFAULT_DEVIATION_SETTING,
        update_epochs=1,
        minibatches=1,
        group_size=1,
    ),
    "rloo": AlgorithmTraits(
        advantages="rloo",
        clips_ratio=False,
        needs_critic=False,
        compares_groups=True,
        deviation_setting=None,
        update_epochs=1,
        minibatches=1,
        group_size=4,
    ),
    "grpo": AlgorithmTraits(
        advantages="grpo",
        clips_ratio=True,
        needs_critic=False,
        compares_groups=True,
        deviation_setting="normalize_std",
        update_epochs=1,
        minibatches=4,
        group_size=4,
    ),
    # REINFORCE++ (Hu et al. 2025, arXiv 2501.03262): reinforce with the clipped loss and minibatches.
    "reinforce++": AlgorithmTraits(
        advantages="returns",
        clips_ratio=True,
        needs_critic=False,
        compares_groups=False,
        deviation_setting=DEFAULT_DEVIATION_SETTING,
        update_epochs=1,
        minibatches=4,
        group_size=1,
    ),
    "reinforce++_base": AlgorithmTraits(
        advantages="group_mean",
        clips_ratio=True,
        needs_critic=False,
        compares_groups=True,
        deviation_setting=DEFAULT_DEVIATION_SETTING,
        update_epochs=1,
        minibatches=4,
        group_size=4,
    ),
}
