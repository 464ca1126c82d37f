"""Forecast the memory and time of a run (`keel plan`), from probes with one layer and with seven layers.

Every layer adds the same memory and time. So a few steps with random models of one layer and of seven layers
determine the cost at full depth. The probes run the real code with the real prompts, widths, vocabulary and batch
sizes.
"""

import json
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from keel.config import PlanConfig, parse
from keel.errors import ConfigError, KeelError
from keel.files import machine_memory
from keel.learn.algorithms import ALGORITHMS
from keel.learn.update import SMALL
from keel.models.ensemble import member_folders
from keel.models.shallow import model_config
from keel.models.trunk_classifier import SequenceClassifier
from keel.training.plan_devices import Memory, checkpoint_bytes, divided_memory, loading_bytes, moved_bytes
from keel.training.plan_engine import with_engine
from keel.training.plan_sizes import MB, base_size, model_sizes, resident
from keel.training.probe import Cost, probe, return_memory

DEEPER = 7  # layers of the second probe: a larger distance between the two depths reduces the error of the line
SMALL_PASS = 2048  # tokens of a forward pass that still keep a CPU busy


def plan(config: PlanConfig) -> dict[str, Any]:
    """Forecast the memory of each model, the peak and seconds of each phase, and the changes that make the run fit.

    The peaks include everything else in the memory of this process: see `keel.training.plan_process`.
    """
    config = with_members(config)
    if config.devices > 1:
        return plan_devices(config)
    available = available_memory(config)
    cost = forecast(config)
    return {
        "models": resident(config),
        "phases": {
            phase: {"peak_mb": cost.peaks[phase] / MB, "seconds": cost.seconds[phase]} for phase in cost.seconds
        },
        "peak_mb": cost.peak / MB,
        "available_mb": available / MB,
        "fits": cost.peak <= available,
        "step_seconds": cost.step_seconds,
        "step_seconds_error": cost.step_error,
        "run_hours": cost.step_seconds * config.steps / 3600,
        "changes": changes_to_fit(config, cost.peak, available) if cost.peak > available else {},
    }


def plan_devices(config: PlanConfig) -> dict[str, Any]:
    """Forecast a run on several devices: the memory, work and traffic of each, and what the host needs.

    Raises ConfigError for settings with which the run would not start.
    """
    check_devices(config)
    cost, memory = forecast_devices(config)
    peak = max(each.peak for each in memory.values())
    sizes, shard = model_sizes(config), config.parallel.shard or config.devices
    available = config.memory_gb * 1e9 if config.memory_gb else device_memory() / processes_per_memory(config)
    passes = optimizer_steps_of_step(config) * cost.microbatches
    moved = moved_bytes(sizes, config.devices, shard, passes, lora_reference(config))
    phases = {
        phase: {
            "models": {name: value / MB for name, value in each.divided.items()},
            "gathered_mb": each.gathered / MB,
            "rest_mb": each.rest / MB,
            "peak_mb": each.peak / MB,
            "seconds": cost.seconds[phase],
            "moved_mb": moved.get(phase, 0.0) / MB,
        }
        for phase, each in memory.items()
    }
    return {
        "devices": config.devices,
        "shard": shard,
        "phases": phases,
        "peak_mb": peak / MB,
        "available_mb": available / MB,
        "fits": peak <= available,
        "step_seconds": cost.step_seconds,
        "step_seconds_error": cost.step_error,
        "run_hours": cost.step_seconds * config.steps / 3600,
        "moved_mb": sum(moved.values()) / MB,
        "loading_mb": loading_bytes(sizes) / MB,
        "checkpoint_mb": checkpoint_bytes(sizes, base_size(config)) / MB,
        "changes": changes_to_fit(config, peak, available) if peak > available else {},
    }


def available_memory(config: PlanConfig) -> float:
    """Return the bytes of memory of the device of a run with one process."""
    return config.memory_gb * 1e9 if config.memory_gb else device_memory()


def check_devices(config: PlanConfig) -> None:
    """Raise ConfigError for settings with which several processes refuse to start."""
    group, shard = config.rollout.group_size or 1, config.parallel.shard or config.devices
    if config.devices % shard:
        raise ConfigError(f"{shard} does not divide the {config.devices} devices", "parallel.shard", "leave it out")
    if config.rollout.batch_size % (config.devices * group):
        raise ConfigError(
            f"{config.rollout.batch_size} responses, in groups of {group}, cannot be divided among {config.devices} "
            "devices",
            where="rollout.batch_size",
            fix=f"make it a multiple of {config.devices * group}",
        )
    if config.rollout.engine != "keel":
        raise ConfigError("vllm samples for one process", "rollout.engine", "use one device, or rollout.engine: keel")
    if config.policy.quantization:
        raise ConfigError(
            "quantized weights cannot be divided among processes",
            where="policy.quantization",
            fix="use one device, or leave quantization out",
        )


def forecast_devices(config: PlanConfig) -> tuple[Cost, dict[str, Memory]]:
    """Forecast the work and the memory of each device: both with its share of the batch."""
    share = device_share(config)
    cost = forecast(share)
    more = optimizer_steps_of_step(config) / optimizer_steps_of_step(share)
    cost = with_factor(cost, more)  # of minibatches with fewer responses than devices
    shard, on_cpu = config.parallel.shard or config.devices, not torch.cuda.is_available()
    return cost, divided_memory(model_sizes(config), cost.peaks, shard, loads_on_device=on_cpu)


def device_share(config: PlanConfig) -> PlanConfig:
    """Return the settings of a run on one device, with the responses that each device has."""
    responses = config.rollout.batch_size // config.devices
    minibatch = -(-(config.algorithm.minibatch_size or config.rollout.batch_size) // config.devices)
    divisor = next(size for size in range(minibatch, responses + 1) if responses % size == 0)
    values = config.model_dump()
    values["rollout"] |= {"batch_size": responses}
    values["algorithm"] |= {"minibatch_size": divisor}
    return parse(PlanConfig, values | {"devices": 1})


def optimizer_steps_of_step(config: PlanConfig) -> int:
    return config.optimizer_steps // config.steps


def lora_reference(config: PlanConfig) -> bool:
    """Whether the reference is the policy without its adapter."""
    return config.measures_kl and config.policy.lora is not None and config.reference is None


def processes_per_memory(config: PlanConfig) -> int:
    """Return how many devices share the memory of this machine: all of them on a CPU, and one on a GPU."""
    return 1 if torch.cuda.is_available() else config.devices


def main() -> None:
    """Read the settings as JSON from stdin, and print the forecast or the error as JSON."""
    config = PlanConfig.model_validate_json(sys.stdin.read())
    with redirect_stdout(sys.stderr):
        try:
            result = {"forecast": plan(config)}
        except KeelError as error:
            result = {"error": {"what": error.what, "where": error.where, "fix": error.fix}}
    print(json.dumps(result))


def with_members(config: PlanConfig) -> PlanConfig:
    """Replace each ensemble of reward models by its members, NAME.0, NAME.1, ..."""
    rewards = []
    for reward in config.rewards:
        members = member_folders(reward.model) if reward.model else [None]
        names = [reward.name] if len(members) == 1 else [f"{reward.name}.{number}" for number in range(len(members))]
        rewards += [
            reward.model_copy(update={"model": model, "name": name}) for model, name in zip(members, names, strict=True)
        ]
    return config.model_copy(update={"rewards": rewards})


def changes_to_fit(config: PlanConfig, peak: float, available: float) -> dict[str, dict[str, float]]:
    """Forecast the run with one change after the other, each in addition to the previous ones, until it fits.

    Changes that save nothing are left out. bfloat16, for one, needs more memory for trained weights (2 bytes besides
    the 4 of the master), and less for frozen models and for the activations that the backward pass needs.

    Args:
        peak: Forecast for `config`, in bytes.
        available: In bytes.
    """
    forecasts: dict[str, dict[str, float]] = {}
    values = config.model_dump()
    for section, settings in possible_changes(config):
        changed = values | {section: values[section] | settings}
        changed_peak, seconds = peak_and_seconds(parse(PlanConfig, changed))
        if changed_peak >= peak:
            continue
        values, peak = changed, changed_peak
        name = ", ".join(f"{section}.{key}: {str(value).lower()}" for key, value in settings.items())
        forecasts[name] = {"peak MB": peak / MB, "seconds a step": seconds}
        if peak <= available:
            break
    return forecasts


def peak_and_seconds(config: PlanConfig) -> tuple[float, float]:
    """Return the peak of a device in bytes, and the seconds of a step."""
    if config.devices == 1:
        cost = forecast(config)
        return cost.peak, cost.step_seconds
    cost, memory = forecast_devices(config)
    return max(each.peak for each in memory.values()), cost.step_seconds


def possible_changes(config: PlanConfig) -> list[tuple[str, dict[str, Any]]]:
    """Return changes (section, settings) that would save memory, those that affect the result least first."""
    has_critic = ALGORITHMS[config.algorithm.name].needs_critic and config.critic.sharing == "separate"
    adapts = config.policy.lora is not None
    can_quantize = config.devices == 1 and all(map(find_spec, ("peft", "bitsandbytes")))
    adapter: dict[str, Any] = {} if adapts else {"lora": {}}  # only the base of an adapter can be quantized
    copies = config.devices // (config.parallel.shard or config.devices)
    changes: list[tuple[str, dict[str, Any], bool]] = [
        ("parallel", {"shard": config.devices}, copies > 1),
        ("rollout", {"engine": "keel", "vllm": {}}, config.rollout.engine != "keel"),
        ("algorithm", {"microbatch_tokens": SMALL_PASS}, config.algorithm.microbatch_tokens > SMALL_PASS),
        ("policy", {"gradient_checkpointing": True}, not config.policy.gradient_checkpointing),
        ("critic", {"sharing": "shared", "init": "policy"}, has_critic),
        ("policy", {"dtype": "bfloat16"}, config.policy.dtype != "bfloat16"),
        ("policy", {"lora": {}}, not adapts and find_spec("peft") is not None),
        ("policy", adapter | {"quantization": "nf4"}, not config.policy.quantization and can_quantize),
    ]
    return [(section, settings) for section, settings, helps in changes if helps]


def forecast(config: PlanConfig) -> Cost:
    """Forecast peak bytes and seconds at full depth."""
    values = config.model_dump(exclude={"response_tokens", "memory_gb", "devices"})
    values["rewards"] = [reward | {"ungated": True} for reward in values["rewards"] if reward["model"]]
    epochs = values["algorithm"]["update_epochs"]
    values["rollout"] |= {"engine": "keel", "vllm": {}}  # the memory of another program is added
    values["algorithm"] |= {"update_epochs": 1}  # all epochs take the same time, so one is measured
    layers = {
        name: model_config(name, kind).get_text_config().num_hidden_layers
        for name, kind in model_sources(values).items()
    }
    counts = sorted(set(layers.values()) - {1})
    depths = [{name: min(DEEPER, count) if layers[name] == count else 1 for name in layers} for count in counts]
    small, costs = policy_is_small(config), []
    with TemporaryDirectory() as folder:
        values["output"] = str(Path(folder) / "run")
        for each in (dict.fromkeys(layers, 1), *depths):
            costs.append(probe(values, each, small, config.response_tokens))
            return_memory()
    deeper = {count: (min(DEEPER, count), cost) for count, cost in zip(counts, costs[1:], strict=True)}
    cost = with_epochs(at_full_depth(costs[0], deeper), epochs)
    return replace(cost, peaks=with_engine(cost.peaks, config, available_memory(config)))


def policy_is_small(config: PlanConfig) -> bool:
    """Whether the policy of full depth is so small that its graph and the critic's are in memory together."""
    return model_sizes(config)["policy"].weights <= SMALL


def with_epochs(cost: Cost, epochs: int) -> Cost:
    """Multiply the cost of the update, measured with one epoch, by the number of epochs."""
    return with_factor(cost, epochs)


def with_factor(cost: Cost, factor: float) -> Cost:
    """Multiply the seconds of the update."""
    seconds, errors = (values | {"update": factor * values["update"]} for values in (cost.seconds, cost.errors))
    return Cost(cost.peaks, seconds, errors, cost.microbatches)


def at_full_depth(one: Cost, more: Mapping[int, tuple[int, Cost]]) -> Cost:
    """Extrapolate the cost to the full depth of all models.

    Args:
        one: cost with one layer in each model.
        more: number of layers -> (depth, cost), where the models of so many layers have `depth` layers.
    """

    def extrapolate(name: str) -> dict[str, float]:
        """Continue the line through both depths."""
        first = getattr(one, name)
        factors = [((count - 1) / (depth - 1), getattr(cost, name)) for count, (depth, cost) in more.items()]
        return {key: value + sum(f * max(0.0, at[key] - value) for f, at in factors) for key, value in first.items()}

    def extrapolate_error(phase: str) -> float:
        """Multiply the error by the factor of the difference that it is part of."""
        first = one.errors.get(phase, 0.0)
        pairs = [((count - 1) / (depth - 1), cost.errors.get(phase, 0.0)) for count, (depth, cost) in more.items()]
        return first + sum(factor * max(first, error) for factor, error in pairs)

    errors = {phase: extrapolate_error(phase) for phase in one.seconds}
    return Cost(extrapolate("peaks"), extrapolate("seconds"), errors, one.microbatches)


def model_sources(values: Mapping[str, Any]) -> dict[str, type]:
    """Return the class of every model that a run loads, by folder or hub id."""
    classes: dict[str, type] = {values["policy"]["model"]: AutoModelForCausalLM}
    if values["reference"]:
        classes.setdefault(values["reference"], AutoModelForCausalLM)
    others = [reward["model"] for reward in values["rewards"]]
    if values["critic"]["init"] not in ("policy", "reward"):
        others.append(values["critic"]["init"])
    return classes | {name: SequenceClassifier for name in others if name not in classes}


def device_memory() -> float:
    """Return the bytes of memory of the GPU, or of the machine within the limits of this process."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return machine_memory()


if __name__ == "__main__":
    main()
