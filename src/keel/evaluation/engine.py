"""Sample the responses of `keel sample` and `keel evaluate` with vLLM."""

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from keel.config import DecodingSettings, EvaluateConfig, SampleConfig
from keel.data.batches import Rollouts
from keel.data.prompts import Prompt, rows_of_varied_length
from keel.errors import ConfigError
from keel.evaluation.evaluated_policy import CHECKED_TOKENS, PASS_TOKENS, EvaluatedPolicy
from keel.learn.pass_check import compare_passes
from keel.rollout.engine import Draws
from keel.world import World, local_device

if TYPE_CHECKING:  # they need a Unix system
    from keel.rollout.vllm.engine import VllmEngine
    from keel.rollout.vllm.responses import ResponseRules

USE_OWN = "use engine: keel"


@dataclass(frozen=True)
class EngineSampler:
    """vLLM with the weights of a policy."""

    engine: "VllmEngine"

    def sample_batches(
        self, policy: EvaluatedPolicy, prompts: list[Prompt], decoding: DecodingSettings, stream: tuple[int | str, ...]
    ) -> Iterator[Rollouts]:
        for start in range(0, len(prompts), decoding.batch_size):
            batch = prompts[start : start + decoding.batch_size]
            draws = Draws(stream, len(prompts), range(start, start + len(batch)))
            rules = response_rules(decoding)
            yield self.engine.generate(policy.model.policy, batch, draws, policy.end_ids, rules=rules)


@contextmanager
def sampled_by_engine(
    policy: EvaluatedPolicy, config: SampleConfig | EvaluateConfig, world: World
) -> Iterator[EvaluatedPolicy]:
    """Yield the policy whose responses the engine of the settings samples inside the block.

    vLLM is checked on two prompts: its log-probs must be those of the policy.

    Raises ConfigError for what vLLM cannot do, and for an engine that does not sample from the policy.
    """
    if config.engine == "keel":
        yield policy
        return
    check_policy_limits(policy, world)
    with (
        TemporaryDirectory(prefix="keel-") as folder,
        closing(new_policy_engine(policy, config, Path(folder))) as engine,
    ):
        engine.send_weights(policy.model.policy)  # it has them already, but no label
        check_engine_sampler(policy, engine, config)
        yield replace(policy, engine=EngineSampler(engine))


def check_policy_limits(policy: EvaluatedPolicy, world: World) -> None:
    """Raise ConfigError for several processes or stop texts of several tokens."""
    if world.size > 1:
        raise ConfigError(f"vllm samples for one process, and there are {world.size}", "engine", USE_OWN)
    if policy.stop_texts:
        what = f"vllm ends responses at single tokens, and the stop text {policy.stop_texts[0]!r} has several"
        raise ConfigError(what, "engine", f"remove it from sampling.stop, or {USE_OWN}")


def new_policy_engine(policy: EvaluatedPolicy, config: SampleConfig | EvaluateConfig, folder: Path) -> "VllmEngine":
    """Return vLLM for a policy; it starts with the first request."""
    from keel.rollout.vllm.engine import VllmEngine
    from keel.rollout.vllm.server import ServerSettings, gpu_number

    vllm = config.vllm
    longest = max(len(prompt.tokens) for prompt in policy.prompts)
    settings = ServerSettings(
        python=vllm.python or sys.executable,
        dtype=vllm.dtype or config.dtype,
        max_model_tokens=longest + config.sampling.max_response_tokens,
        devices=gpu_number(local_device(), vllm.devices),
        memory=vllm.memory,
        sleeps=False,
        timeout_seconds=vllm.timeout_seconds,
        log=folder / "engine.log",
    )
    return VllmEngine(settings, response_rules(config.sampling), policy.tokenizer)


def check_engine_sampler(policy: EvaluatedPolicy, engine: "VllmEngine", config: SampleConfig | EvaluateConfig) -> None:
    """Compare the engine with a full pass of the policy on two prompts. Raises ConfigError where they disagree."""
    rows = rows_of_varied_length(policy.prompts, 2)
    prompts = [policy.prompts[row] for row in rows]
    temperature = config.sampling.temperature or 1.0
    plain = config.sampling.model_copy(update={"temperature": temperature, "top_k": 0, "top_p": 1.0})
    draws = Draws((config.seed, "check"), len(rows), range(len(rows)))
    tokens = min(config.sampling.max_response_tokens, CHECKED_TOKENS)
    rollouts = engine.generate(policy.model.policy, prompts, draws, policy.end_ids, tokens, response_rules(plain))
    dtype = torch.bfloat16 if "bfloat16" in (config.dtype, config.vllm.dtype) else None
    compare_passes(policy.model, rollouts, temperature, PASS_TOKENS, where="engine", sampler_dtype=dtype)


def response_rules(decoding: DecodingSettings) -> "ResponseRules":
    from keel.rollout.vllm.responses import ResponseRules

    return ResponseRules(
        decoding.max_response_tokens, decoding.temperature, decoding.stop_in_text, decoding.top_k, decoding.top_p
    )
