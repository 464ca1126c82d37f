"""What other parts of keel must know about the algorithms without importing torch.

`keel.learn.algorithms` has the functions of each algorithm; both tables have the same names.
"""

from dataclasses import dataclass

DEFAULT_DEVIATION_SETTING = "whiten_advantages"


@dataclass(frozen=True)
class AlgorithmTraits:
    needs_critic: bool
    compares_groups: bool
    """advantages are relative to the other responses to the prompt; whitening the batch would undo that scale"""
    clips_ratio: bool
    """the loss corrects for the distance to the policy that sampled, so that a batch can be used more than once"""
    deviation_setting: str | None = DEFAULT_DEVIATION_SETTING
    """the setting of `algorithm` that gives the advantages a standard deviation of 1; None: they keep the scores'"""


ALGORITHM_TRAITS = {
    "ppo": AlgorithmTraits(needs_critic=True, compares_groups=False, clips_ratio=True),
    "a2c": AlgorithmTraits(needs_critic=True, compares_groups=False, clips_ratio=False),
    "reinforce": AlgorithmTraits(needs_critic=False, compares_groups=False, clips_ratio=False),
    "rloo": AlgorithmTraits(needs_critic=False, compares_groups=True, clips_ratio=False, deviation_setting=None),
    "grpo": AlgorithmTraits(
        needs_critic=False, compares_groups=True, clips_ratio=True, deviation_setting="normalize_std"
    ),
}
