"""What a run will take, foretold by the same run with one layer and with two: `keel plan`.

Every layer adds the same memory and the same time. So steps of the real code, with the real prompts, widths, vocabulary
and batch sizes, but random models of one layer, and then of two, foretell those of the full depth.
"""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn import Module
from transformers import AutoConfig, AutoModelForCausalLM

from keel.config import PlanConfig, parse
from keel.errors import ConfigError
from keel.learn.algorithms import ALGORITHMS
from keel.models.adapters import base_of, with_lora
from keel.models.ensemble import members_of
from keel.models.files import is_adapter
from keel.models.loading import DTYPES, load_tokenizer
from keel.models.trunk_classifier import SequenceClassifier
from keel.train.probe import Cost, probe_apart

MB = 1e6
SMALL_PASS = 2048  # tokens of a forward pass that still keep a CPU busy


def plan(config: PlanConfig) -> dict[str, Any]:
    """The forecast: memory of each model, peak and seconds of each phase, and the changes that make the run fit."""
    config = with_members(config)
    available = config.memory_gb * 1e9 if config.memory_gb else machine_memory()
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
        "run_hours": cost.step_seconds * config.steps / 3600,
        "changes": changes_to_fit(config, available) if cost.peak > available else {},
    }


def with_members(config: PlanConfig) -> PlanConfig:
    """The same run with each ensemble of reward models as so many single ones."""
    rewards = [
        reward.model_copy(update={"model": model})
        for reward in config.rewards
        for model in (members_of(reward.model) if reward.model else [None])
    ]
    return config.model_copy(update={"rewards": rewards})


def changes_to_fit(config: PlanConfig, available: float) -> dict[str, dict[str, float]]:
    """Forecasts under one change after the other, each on top of those before, until the run fits."""
    found: dict[str, dict[str, float]] = {}
    values = config.model_dump()
    for section, settings in possible_changes(config):
        values = values | {section: values[section] | settings}
        cost = forecast(parse(PlanConfig, values))
        name = ", ".join(f"{section}.{key}: {str(value).lower()}" for key, value in settings.items())
        found[name] = {"peak MB": cost.peak / MB, "seconds a step": cost.step_seconds}
        if cost.peak <= available:
            break
    return found


def possible_changes(config: PlanConfig) -> list[tuple[str, dict[str, Any]]]:
    """What would save memory and is not done yet: section and settings, those that change the result least first."""
    has_critic = ALGORITHMS[config.algorithm.name].needs_critic and config.critic.sharing == "separate"
    changes: list[tuple[str, dict[str, Any], bool]] = [
        ("algorithm", {"microbatch_tokens": SMALL_PASS}, config.algorithm.microbatch_tokens > SMALL_PASS),
        ("policy", {"gradient_checkpointing": True}, not config.policy.gradient_checkpointing),
        ("critic", {"sharing": "shared", "init": "policy"}, has_critic),
        ("policy", {"dtype": "bfloat16"}, config.policy.dtype != "bfloat16"),
        ("policy", {"lora": {}}, config.policy.lora is None and find_spec("peft") is not None),
    ]
    return [(section, settings) for section, settings, helps in changes if helps]


def forecast(config: PlanConfig) -> Cost:
    """Peak bytes and seconds at full depth."""
    values = config.model_dump(exclude={"response_tokens", "memory_gb"})
    values["rewards"] = [reward for reward in values["rewards"] if reward["model"]]
    models = sources(values)
    with TemporaryDirectory() as folder:
        values["output"] = str(Path(folder) / "run")

        def measure(deeper: str | None) -> Cost:
            """All models with one layer, but one of them with two."""
            small = {name: shallow(name, kind, 1 + (name == deeper), Path(folder)) for name, kind in models.items()}
            return probe_apart(_renamed(values, small), config.response_tokens)

        one = measure(None)
        two = {name: measure(name) for name in models}
    layers = {name: model_config(name, kind).get_text_config().num_hidden_layers for name, kind in models.items()}

    def at_full_depth(part: str) -> dict[str, float]:
        first = getattr(one, part)
        more = {name: getattr(cost, part) for name, cost in two.items()}
        return {
            key: value + sum((layers[name] - 1) * max(0.0, more[name][key] - value) for name in models)
            for key, value in first.items()
        }

    return Cost(at_full_depth("peaks"), at_full_depth("seconds"))


def sources(values: Mapping[str, Any]) -> dict[str, type]:
    """Folder or hub id of every model that a run loads, and as what."""
    own = {"policy", "reward"}
    found: dict[str, type] = {values["policy"]["model"]: AutoModelForCausalLM}
    if values["reference"]:
        found.setdefault(values["reference"], AutoModelForCausalLM)
    others = [reward["model"] for reward in values["rewards"]]
    if values["critic"]["init"] not in own:
        others.append(values["critic"]["init"])
    return found | {name: SequenceClassifier for name in others if name not in found}


def _renamed(values: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The same settings with other models."""
    return values | {
        "policy": values["policy"] | {"model": names[values["policy"]["model"]]},
        "reference": names.get(values["reference"]),
        "critic": values["critic"] | {"init": names.get(values["critic"]["init"], values["critic"]["init"])},
        "rewards": [reward | {"model": names[reward["model"]]} for reward in values["rewards"]],
    }


def shallow(source: str, kind: Any, layers: int, folder: Path) -> str:
    """A folder with a random model like `source`, but of so few layers."""
    place = folder / f"{abs(hash(source))}-{layers}"
    if not place.exists():
        config = model_config(source, kind)
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
        kind.from_config(config).save_pretrained(place)
        load_tokenizer(source).save_pretrained(place)
    return str(place)


def model_config(source: str, kind: Any) -> Any:
    """That of its base for an adapter. Raises ConfigError when there is none."""
    if is_adapter(Path(source)):
        return model_config(base_of(Path(source)), kind)
    labels = {"num_labels": 1} if kind is SequenceClassifier else {}
    try:
        return AutoConfig.from_pretrained(source, **labels)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the model's config: {str(error).splitlines()[0]}", where=source) from error


def resident(config: PlanConfig) -> dict[str, dict[str, float]]:
    """MB of weights, gradients and optimizer state of each model, from its config alone."""
    critic_source = {"policy": config.policy.model, "reward": next((r.model for r in config.rewards if r.model), None)}
    found = {"policy": _megabytes(_empty(config.policy.model, AutoModelForCausalLM, config, "CAUSAL_LM"), learns=True)}
    if ALGORITHMS[config.algorithm.name].needs_critic and config.critic.sharing == "separate":
        source = str(critic_source.get(config.critic.init, config.critic.init))
        found["critic"] = _megabytes(
            _empty(source, SequenceClassifier, config, "SEQ_CLS"),
            learns=True,
            own_base=config.policy.lora is None or source != config.policy.model,
        )
    own_base = config.policy.lora is not None and config.reference is None
    if not own_base and config.measures_kl:
        source = config.reference or config.policy.model
        found["reference"] = _megabytes(_empty(source, AutoModelForCausalLM, config), learns=False)
    for number, reward in enumerate(config.rewards, 1):
        if reward.model:
            model = _empty(reward.model, SequenceClassifier)
            name = f"reward {_own_name(reward.model)}"
            found[f"{name} {number}" if name in found else name] = _megabytes(model, learns=False)
    return found


def _own_name(source: str) -> str:
    """Of a run folder's model that of the folder, for all models there have the same."""
    path = Path(source)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def _empty(source: str, kind: Any, config: PlanConfig | None = None, task: str | None = None) -> Any:
    """The model without its weights; with the run's settings in the run's dtype, for a task with the run's adapter."""
    dtype = DTYPES[config.policy.dtype] if config else torch.float32
    with torch.device("meta"):
        model = kind.from_config(model_config(source, kind), dtype=dtype)
        return with_lora(model, config.policy.lora, task) if config and config.policy.lora and task else model


def _megabytes(model: Module, learns: bool, own_base: bool = True) -> dict[str, float]:
    size = {p: p.numel() * p.dtype.itemsize / MB for p in model.parameters()}
    trained = sum(size[p] for p in size if p.requires_grad) if learns else 0.0
    return {"weights": sum(size.values()) if own_base else trained, "gradients": trained, "optimizer": 2 * trained}


def machine_memory() -> float:
    """Bytes of the GPU, or of the machine as far as this process may use them."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, float(text)) if text.isdigit() else total
