"""Settings of `keel drift`."""

from pydantic import model_validator

from keel.config.sections import CountOrNone, Dtype, PromptSettings, Settings


class DriftConfig(Settings):
    """Settings of `keel drift`: do the run's reward models still apply to the prompts or answers of today?"""

    run: str
    """the run folder of `keel train` that made the policy"""
    prompts: PromptSettings | None = None
    """today's prompts; the run's policy answers them"""
    answers: str | None = None
    """instead: logged rows of `prompt, response`, which are judged as they are"""
    slices: list[str] = []
    """columns by whose values the figures are told apart"""
    dtype: Dtype = "float32"
    """number format of the weights of policy and reference"""
    output: str | None = None
    """write figures and answers (JSON) to this file, and beside it what people should rank if the figures moved"""
    max_prompts: CountOrNone = 0
    """at most so many of today's rows, chosen at random; 0 = all"""
    seed: int = 0
    """of sampling, of the choice of rows and of the tests"""

    @model_validator(mode="after")
    def _exactly_one(self) -> "DriftConfig":
        if (self.prompts is None) == (self.answers is None):
            raise ValueError("give either prompts.path or answers")
        return self
