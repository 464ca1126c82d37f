"""Settings of `keel drift`."""

from typing import ClassVar

from pydantic import model_validator

from keel.config.base import CountOrNone, Dtype, Settings
from keel.config.sections import PromptSettings


class DriftConfig(Settings):
    """Settings of `keel drift`: test whether a run's reward models still apply to today's prompts or responses."""

    main_settings: ClassVar[tuple[str, ...]] = (
        "run",
        "prompts.path",
        "prompts.column",
        "answers",
        "slices",
        "max_prompts",
        "output",
        "seed",
    )

    run: str
    """Run folder of the `keel train` run that made the policy"""
    prompts: PromptSettings | None = None
    """Today's prompts, for which the policy of the run samples responses; give either these or `answers`"""
    answers: str | None = None
    """File of logged `prompt, response` rows to score as they are, instead of `prompts`"""
    slices: list[str] = []
    """Columns of the rows; metrics are also computed for each of their values"""
    dtype: Dtype = "float32"
    """Number format of the weights of policy and reference"""
    output: str | None = None
    """Write metrics and responses to this JSON file; if a metric moved, also write a file for `keel rank` beside it"""
    max_prompts: CountOrNone = 0
    """Largest number of today's rows to use, chosen at random; 0 = all"""
    seed: int = 0
    """Random seed of sampling, of the choice of rows and of the tests"""

    @model_validator(mode="after")
    def _check_source(self) -> "DriftConfig":
        if (self.prompts is None) == (self.answers is None):
            raise ValueError("give either prompts.path or answers")
        return self
