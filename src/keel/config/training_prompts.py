"""Settings of the prompts that a policy is trained on: one file or several, filtered by measured scores."""

from pydantic import model_validator

from keel.config.base import Positive, Settings
from keel.config.sections import PromptSettings


class PromptFile(Settings):
    """A further file of prompts."""

    path: str
    """File of JSON lines or Parquet, or hub data set, with one prompt in each row"""
    split: str = "train"
    """Split of a hub data set"""
    weight: Positive | None = None
    """Share of the draws, relative to the weights of the other files"""


class DifficultySettings(Settings):
    path: str
    """File with the scores of responses to the prompts: what `keel evaluate --output` wrote, or rows of `prompt` and
    `score`"""
    min_score: float | None = None
    """Leave out prompts whose mean score in the file is below this"""
    max_score: float | None = None
    """Leave out prompts whose mean score in the file is above this"""

    @model_validator(mode="after")
    def _check_limits(self) -> "DifficultySettings":
        if self.min_score is None and self.max_score is None:
            raise ValueError("set min_score, max_score or both")
        if self.min_score is not None and self.max_score is not None and self.min_score > self.max_score:
            raise ValueError(f"min_score {self.min_score:g} is above max_score {self.max_score:g}; swap them")
        return self


class TrainPrompts(PromptSettings):
    weight: Positive | None = None
    """Share of the draws from path, relative to the weights of `others`; with no weights, all prompts are drawn equally
    often"""
    others: list[PromptFile] = []
    """Further files of prompts, as a JSON list, e.g. [{"path": "more.jsonl", "weight": 0.5}]"""
    difficulty: DifficultySettings | None = None
    """Leave out prompts that are too easy or too hard for the initial policy, by scores that were measured before"""

    @property
    def files(self) -> list[PromptFile]:
        """All files of prompts, that of `path` first."""
        return [PromptFile(path=self.path, split=self.split, weight=self.weight), *self.others]

    @model_validator(mode="after")
    def _check_weights(self) -> "TrainPrompts":
        weights = [file.weight for file in self.files]
        if any(weights) and not all(weights):
            raise ValueError("set the weight of every file of prompts, or of none")
        if self.weight and not self.others:
            raise ValueError("weight mixes several files; name the others in prompts.others, or remove it")
        return self
