"""Forecast the memory and time of a run (`keel plan`), from probes with one layer and with seven layers.

Every layer adds the same memory and time. So a few steps with random models of one layer and of seven layers
determine the cost at full depth. The probes run the real code with the real prompts, widths, vocabulary and batch
sizes.
"""

import json
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn import Module
from transformers import AutoModelForCausalLM

from keel.config import PlanConfig, parse
from keel.errors import KeelError
from keel.files import machine_memory
from keel.learn.algorithms import ALGORITHMS
from keel.learn.masters import needs_master
from keel.learn.update import SMALL
from keel.models.adapters import with_lora
from keel.models.ensemble import member_folders
from keel.models.loading import DTYPES
from keel.models.shallow import model_config
from keel.models.trunk_classifier import SequenceClassifier
from keel.training.probe import Cost, probe, return_memory

MB = 1e6
DEEPER = 7  # layers of the second probe: a larger distance between the two depths reduces the error of the line
SMALL_PASS = 2048  # tokens of a forward pass that still keep a CPU busy


def plan(config: PlanConfig) -> dict[str, Any]:
    """Forecast the memory of each model, the peak and seconds of each phase, and the changes that make the run fit.

    The peaks include everything else in the memory of this process: see `keel.training.plan_process`.
    """
    config = with_members(config)
    available = config.memory_gb * 1e9 if config.memory_gb else device_memory()
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
        cost = forecast(parse(PlanConfig, changed))
        if cost.peak >= peak:
            continue
        values, peak = changed, cost.peak
        name = ", ".join(f"{section}.{key}: {str(value).lower()}" for key, value in settings.items())
        forecasts[name] = {"peak MB": cost.peak / MB, "seconds a step": cost.step_seconds}
        if cost.peak <= available:
            break
    return forecasts


def possible_changes(config: PlanConfig) -> list[tuple[str, dict[str, Any]]]:
    """Return changes (section, settings) that would save memory, those that affect the result least first."""
    has_critic = ALGORITHMS[config.algorithm.name].needs_critic and config.critic.sharing == "separate"
    adapts, can_quantize = config.policy.lora is not None, all(map(find_spec, ("peft", "bitsandbytes")))
    adapter: dict[str, Any] = {} if adapts else {"lora": {}}  # only the base of an adapter can be quantized
    changes: list[tuple[str, dict[str, Any], bool]] = [
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
    values = config.model_dump(exclude={"response_tokens", "memory_gb"})
    values["rewards"] = [reward | {"ungated": True} for reward in values["rewards"] if reward["model"]]
    epochs = values["algorithm"]["update_epochs"]
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
    return with_epochs(at_full_depth(costs[0], deeper), epochs)


def policy_is_small(config: PlanConfig) -> bool:
    """Whether the policy of full depth is so small that its graph and the critic's are in memory together."""
    model = _empty(config.policy.model, AutoModelForCausalLM, config, "CAUSAL_LM")
    return sum(parameter.numel() for parameter in model.parameters()) <= SMALL


def with_epochs(cost: Cost, epochs: int) -> Cost:
    """Multiply the cost of the update, measured with one epoch, by the number of epochs."""
    seconds, errors = (values | {"update": epochs * values["update"]} for values in (cost.seconds, cost.errors))
    return Cost(cost.peaks, seconds, errors)


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
    return Cost(extrapolate("peaks"), extrapolate("seconds"), errors)


def model_sources(values: Mapping[str, Any]) -> dict[str, type]:
    """Return the class of every model that a run loads, by folder or hub id."""
    classes: dict[str, type] = {values["policy"]["model"]: AutoModelForCausalLM}
    if values["reference"]:
        classes.setdefault(values["reference"], AutoModelForCausalLM)
    others = [reward["model"] for reward in values["rewards"]]
    if values["critic"]["init"] not in ("policy", "reward"):
        others.append(values["critic"]["init"])
    return classes | {name: SequenceClassifier for name in others if name not in classes}


def resident(config: PlanConfig) -> dict[str, dict[str, float]]:
    """Compute the MB of weights, gradients and optimizer state of each model, from its config alone."""
    critic_source = {"policy": config.policy.model, "reward": next((r.model for r in config.rewards if r.model), None)}
    models = {"policy": _megabytes(_empty(config.policy.model, AutoModelForCausalLM, config, "CAUSAL_LM"), learns=True)}
    if ALGORITHMS[config.algorithm.name].needs_critic and config.critic.sharing == "separate":
        source = str(critic_source.get(config.critic.init, config.critic.init))
        models["critic"] = _megabytes(
            _empty(source, SequenceClassifier, config, "SEQ_CLS"),
            learns=True,
            own_base=config.policy.lora is None or source != config.policy.model,
        )
    shares_policy = config.policy.lora is not None and config.reference is None
    if not shares_policy and config.measures_kl:
        source = config.reference or config.policy.model
        models["reference"] = _megabytes(_empty(source, AutoModelForCausalLM, config), learns=False)
    for reward in config.rewards:
        if reward.model:
            model = _empty(reward.model, SequenceClassifier)
            models[f"reward {reward.name}"] = _megabytes(model, learns=False)
    return models


def _empty(source: str, kind: Any, config: PlanConfig | None = None, task: str | None = None) -> Any:
    """Build a model on the meta device. With `config` it has the run's dtype, and with `task` the run's adapter."""
    dtype = DTYPES[config.policy.dtype] if config else torch.float32
    with torch.device("meta"):
        model = kind.from_config(model_config(source, kind), dtype=dtype)
        if config and config.policy.lora and task:
            return with_lora(model, config.policy.lora, task, config.policy.quantization)
        return model


def _megabytes(model: Module, learns: bool, own_base: bool = True) -> dict[str, float]:
    size = {p: p.numel() * p.dtype.itemsize / MB for p in model.parameters()}
    trained = [p for p in size if p.requires_grad and learns]
    weights = sum(size.values()) if own_base else sum(size[p] for p in trained)
    gradients = 4 / MB * sum(p.numel() for p in trained)  # gradients, moments and masters are float32
    masters = 4 / MB * sum(p.numel() for p in trained if needs_master(p))
    return {"weights": weights, "gradients": gradients, "optimizer": 2 * gradients + masters}


def device_memory() -> float:
    """Return the bytes of memory of the GPU, or of the machine within the limits of this process."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return machine_memory()


if __name__ == "__main__":
    main()
