"""Settings of a judge: a language model that evaluates responses by a rubric."""

from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from keel.config.base import Count, NonNegative, Positive, Settings
from keel.naming import clean_name


class JudgeSettings(Settings):
    """A language model behind an OpenAI-compatible endpoint. Its key is the environment variable KEEL_JUDGE_KEY."""

    url: str
    """Address of an OpenAI-compatible endpoint, as in http://HOST/v1"""
    model: str
    """Name of the model at the endpoint"""
    rubric: str
    """Text file that describes what makes a response good or bad"""
    reasons: bool = True
    """Ask for a reason before the verdict, which costs tokens and usually makes verdicts better"""
    max_tokens: Count = 512
    """Longest reply of the judge, in tokens"""
    cache: str = "judge-cache.sqlite"
    """File of the replies so far; an equal question is not asked again. Several processes can share it"""
    input_price: NonNegative = 0.0
    """Price of a million tokens that the judge reads, in any currency"""
    output_price: NonNegative = 0.0
    """Price of a million tokens that the judge writes, in the same currency"""
    timeout_seconds: Positive = 600.0
    """Deadline for one batch of questions, retries included"""

    @property
    def label(self) -> str:
        """Name of the model without its folders, for metrics and raters."""
        return clean_name(PurePath(self.model).name) or "judge"


def _check_scale(scale: tuple[int, int]) -> tuple[int, int]:
    if scale[0] >= scale[1]:
        raise ValueError(f"the scale [{scale[0]}, {scale[1]}] must end above its start")
    return scale


class ScorerJudge(JudgeSettings):
    """A judge as a scorer."""

    mode: Literal["score", "pairwise", "ranking"] = "score"
    """score: a number for each response; pairwise: compare all pairs of responses to a prompt, in both orders; ranking:
    rank all responses to a prompt. The last two score a response by the share of the others that it beats"""
    scale: Annotated[tuple[int, int], AfterValidator(_check_scale)] = (1, 10)
    """Worst and best number, with mode: score"""


class RaterJudge(JudgeSettings):
    """A judge that ranks the items of a study beside the people."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] | None = None
    """Name as a rater (default: the name of the model)"""
