"""Settings of `keel evaluate`."""

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, field_validator, model_validator

from keel.config.sections import CountOrNone, DecodingSettings, Dtype, PromptSettings, Rewards, Settings, as_list


class EvaluateConfig(Settings):
    """Settings of `keel evaluate`: judge policies, alone and against another, on prompts they were not trained on."""

    policy: Annotated[list[str], BeforeValidator(as_list), Field(min_length=1)] = []
    """folder or hub id of the policy to judge; several get a column each"""
    checkpoints: str | None = None
    """instead: a run folder of keel train, whose start, checkpoints and result are judged; scorers, reference, length
    and temperature that are not given are those of the run"""
    against: str | None = None
    """folder of another policy: adds its figures and the win rate against it"""
    reference: str | None = None
    """folder that the KL is measured to (default: `against`)"""
    dtype: Dtype = "float32"
    """number format of the weights of policies and reference"""
    prompts: PromptSettings
    rewards: Rewards = []
    """the scorers; their weighted sum is the score"""
    judge: str | None = None
    """name of the scorer that decides who wins (default: the weighted sum)"""
    slices: list[str] = []
    """columns of the prompts, by whose values every figure is told apart"""
    best_of: CountOrNone = 0
    """what the best 1, 2, ... of so many answers to a prompt are worth; at most sampling.num_responses, 0 = none"""
    pairs: str | None = None
    """write a pair of answers to each prompt to this .jsonl file, for people to judge blindly with keel rank"""
    judgements: str | None = None
    """what keel rank exported of the `pairs`: adds the win rate by people"""
    gate: str | None = None
    """what a release must reach, as in "win_rate>=0.6, high(kl)<=20, slice[refund].score>=0"; or a file of such"""
    output: str | None = None
    """write figures and answers (JSON) to this file, and the verdict of the gate beside it"""
    seed: int = 0
    """of sampling and of the bootstrap"""
    sampling: DecodingSettings = DecodingSettings()

    @field_validator("policy")
    @classmethod
    def _each_once(cls, policies: list[str]) -> list[str]:
        if len({Path(policy) for policy in policies}) < len(policies):
            raise ValueError("the same policy is given twice")
        return policies

    @model_validator(mode="after")
    def _fits_together(self) -> "EvaluateConfig":
        if bool(self.policy) == (self.checkpoints is not None):
            raise ValueError("give either policy or checkpoints")
        for name in ("gate", "pairs"):
            if getattr(self, name) is not None and len(self.policy) != 1:
                raise ValueError(f"{name}: only with one policy")
        if self.pairs is not None and self.against is None:
            raise ValueError("pairs: needs `against`, whose answers stand beside the policy's")
        if self.judgements is not None and self.pairs is None:
            raise ValueError("judgements: give the `pairs` that were judged as well")
        if self.best_of > self.sampling.num_responses:
            raise ValueError(
                f"best_of: {self.best_of} of {self.sampling.num_responses} answers to a prompt; "
                "lower it, or raise sampling.num_responses"
            )
        return self
