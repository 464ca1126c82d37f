"""Choose what samples the responses of a run, and refuse what the engine cannot do exactly."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from keel.config import TrainConfig
from keel.data.prompts import Prompt
from keel.errors import ConfigError
from keel.rollout.engine import Engine, OwnSampler
from keel.world import World

LOG = "engine.log"
"""File of the run folder with what vLLM prints."""


def build_engine(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    stop_texts: tuple[str, ...],
    prompts: Sequence[Prompt],
    world: World,
) -> Engine:
    """Return the engine of a run. vLLM starts with its first batch.

    Args:
        prompts: all prompts of the run; the longest one determines the longest row.

    Raises ConfigError for settings that vLLM cannot follow exactly.
    """
    rollout = config.rollout
    if rollout.engine == "keel":
        return OwnSampler(tokenizer, rollout.max_response_tokens, rollout.temperature, rollout.stop_in_text, stop_texts)
    check_engine_limits(config, stop_texts, world)
    from keel.rollout.vllm.engine import VllmEngine  # needs a Unix system
    from keel.rollout.vllm.responses import ResponseRules
    from keel.rollout.vllm.server import ServerSettings, gpu_number

    vllm = rollout.vllm
    longest = max((len(prompt.tokens) for prompt in prompts), default=config.prompts.max_tokens)
    settings = ServerSettings(
        python=vllm.python or sys.executable,
        dtype=vllm.dtype or config.policy.dtype,
        max_model_tokens=longest + rollout.max_response_tokens,
        devices=gpu_number(world.device, vllm.devices),
        memory=vllm.memory,
        sleeps=vllm.sleep and vllm.devices is None and world.device.type == "cuda",
        timeout_seconds=vllm.timeout_seconds,
        log=Path(config.output) / LOG,
    )
    rules = ResponseRules(rollout.max_response_tokens, rollout.temperature, rollout.stop_in_text)
    return VllmEngine(settings, rules, tokenizer)


def engine_dtype(config: TrainConfig) -> torch.dtype:
    """Return the coarser one of the number formats in which the engine and the policy compute."""
    formats = {config.policy.dtype, config.rollout.vllm.dtype or config.policy.dtype}
    return torch.bfloat16 if "bfloat16" in formats else torch.float32


def correction_cap(config: TrainConfig) -> float | None:
    """Return the cap of the corrections of the policy loss; None for no correction.

    vLLM in float32 is not corrected: its log-probs differ by rounding, and their last bits depend on which responses
    were sampled together. Without them, a resumed run gives the same weights to the bit.
    """
    is_exact = config.rollout.engine != "keel" and engine_dtype(config) == torch.float32
    return None if is_exact else config.rollout.correction_cap


def check_engine_limits(config: TrainConfig, stop_texts: Sequence[str], world: World) -> None:
    """Raise ConfigError for what vLLM would do differently from keel's sampler, or has not been tested."""
    where, fix = "rollout.engine", "use rollout.engine: keel"
    if world.size > 1:
        raise ConfigError(f"vllm samples for one process, and this run has {world.size}", where, fix)
    if stop_texts:
        what = f"vllm ends responses at single tokens, and the stop text {stop_texts[0]!r} has several"
        raise ConfigError(what, where, f"remove it from rollout.stop, or {fix}")
    if config.policy.quantization is not None:
        raise ConfigError("vllm would sample from dequantized weights, which differ", where, fix)
    if sys.platform == "win32":
        raise ConfigError("vllm needs Unix sockets", where, fix)
