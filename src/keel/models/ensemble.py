"""Ensembles of reward models. Where the members disagree, their scores are unreliable."""

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from keel.data.named_templates import set_chat_template
from keel.data.rows import Content
from keel.errors import ConfigError
from keel.models.loading import load_tokenizer
from keel.models.reading import Reading
from keel.models.reward_model import RewardModel
from keel.models.sameness import probe_tokens

FILE = "ensemble.json"


class RewardEnsemble:
    """Scores a response by the mean or the minimum over the members, or by mean - std_coef * deviation.

    Coste et al. 2023 (section 3) compare the three. The deviation is the biased one, divided by the number of members.
    """

    def __init__(
        self, members: Sequence[RewardModel], combine: str = "mean", std_coef: float = 1.0, temperature: float = 1.0
    ) -> None:
        self.members, self.combine, self.std_coef, self.temperature = list(members), combine, std_coef, temperature

    @classmethod
    def load(
        cls,
        folder: str,
        combine: str = "mean",
        std_coef: float = 1.0,
        chat_template: str | None = None,
        dtype: str = "float32",
    ) -> Self:
        """Load a saved ensemble. Raises ConfigError if the ensemble or a member cannot be loaded."""
        members = [load_member(member, chat_template, dtype) for member in member_folders(folder)]
        return cls(members, combine, std_coef, read_ensemble(folder)["temperature"])

    def score(self, prompts: Sequence[Content], responses: Sequence[str]) -> Tensor:
        """Score responses that have ended, on the CPU and without gradients. -> [N] float32"""
        return self.score_readings([Reading(*each) for each in zip(prompts, responses, strict=True)])

    def score_readings(self, readings: Sequence[Reading]) -> Tensor:
        """Score responses that may be truncated, to prompts that may have tools. -> [N] float32"""
        return self.combine_scores(self.member_scores(readings))

    def member_scores(self, readings: Sequence[Reading]) -> Tensor:
        """Return the scores by each member. -> [members, N] float32"""
        return torch.stack([member.score_readings(readings) for member in self.members]) / self.temperature

    @property
    def cut(self) -> list[bool]:
        """Whether the beginning of each text of the last call was cut for a member."""
        return [any(flags) for flags in zip(*(member.cut for member in self.members), strict=True)]

    def combine_scores(self, scores: Tensor) -> Tensor:
        """Combine the scores of the members. [members, N] -> [N]"""
        if self.combine == "min":
            return scores.min(0).values
        if self.combine == "lower":
            return scores.mean(0) - self.std_coef * scores.std(0, correction=0)
        return scores.mean(0)


def load_member(name: str, chat_template: str | None, dtype: str) -> RewardModel:
    """Load a saved reward model.

    Args:
        chat_template: replaces the chat template of its tokenizer.

    Raises ConfigError if it cannot be loaded, or if it scores every text alike, as a new head does.
    """
    tokenizer = load_tokenizer(name) if chat_template else None
    set_chat_template(tokenizer, chat_template)
    member = RewardModel.load(name, dtype, tokenizer=tokenizer)
    scores = member.score_rows(probe_tokens(member.model).tolist())
    if (scores == scores[0]).all():
        what = f"this model gives every text the same score ({scores[0]:g}), so its head was never trained"
        raise ConfigError(what, where=name, fix="train it with `keel reward`")
    return member


def load_reward_model(
    folder: str,
    combine: str = "mean",
    std_coef: float = 1.0,
    chat_template: str | None = None,
    dtype: str = "float32",
) -> RewardModel | RewardEnsemble:
    """Load the reward model or the ensemble in a folder. Raises ConfigError."""
    if is_ensemble(folder):
        return RewardEnsemble.load(folder, combine, std_coef, chat_template, dtype)
    if combine != "mean":
        raise ConfigError(
            f"`combine: {combine}` is for an ensemble, but this is a single model",
            where=folder,
            fix="leave out `combine`, or name an ensemble",
        )
    return load_member(folder, chat_template, dtype)


def is_ensemble(folder: str) -> bool:
    return (Path(folder) / FILE).is_file()


def member_models(reward_model: RewardModel | RewardEnsemble) -> list[RewardModel]:
    return reward_model.members if isinstance(reward_model, RewardEnsemble) else [reward_model]


def member_folders(folder: str) -> list[str]:
    """Return the folders of an ensemble's members; for a single model or a hub id, only that."""
    return [str(Path(folder) / name) for name in read_ensemble(folder)["members"]] if is_ensemble(folder) else [folder]


def save_ensemble(folder: Path, members: Sequence[Path], temperature: float = 1.0) -> None:
    """Save an ensemble: a copy of each member and a list of them.

    The copies are hard links if possible, so that they take no space on the disk.
    """
    names = [f"member-{number}" for number in range(1, len(members) + 1)]
    for name, member in zip(names, members, strict=True):
        shutil.copytree(member, folder / name, copy_function=_link)
    text = json.dumps({"members": names, "temperature": temperature}, indent=1)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def read_ensemble(folder: str) -> dict[str, Any]:
    """Read the list of an ensemble's members. Raises ConfigError if it is damaged or names anything but its folders."""
    path = Path(folder) / FILE
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        members, temperature = saved["members"], float(saved["temperature"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "cannot read the list of the ensemble's members",
            where=str(path),
            fix="copy the complete folder of the ensemble again",
        ) from error
    exist = isinstance(members, list) and all(
        isinstance(name, str) and (path.parent / name).is_dir() for name in members
    )
    if not members or not exist or any(Path(name).name != name or name == ".." for name in members):
        raise ConfigError(
            "members must be folders beside this file",
            where=str(path),
            fix="copy the complete folder of the ensemble again",
        )
    if not 0 < temperature < math.inf:
        raise ConfigError(f"temperature is {temperature}", where=str(path), fix="set it to a number above 0")
    return {"members": members, "temperature": temperature}


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # the target is on another disk, or the disk has no hard links
        shutil.copy2(source, target)
