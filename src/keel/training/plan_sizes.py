"""Sizes of the models of a run, from their configs alone: they are built on the meta device, without weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Module, Parameter
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from keel.config import PlanConfig
from keel.learn.algorithms import ALGORITHMS
from keel.learn.masters import needs_master
from keel.models.adapters import with_lora
from keel.models.loading import DTYPES
from keel.models.shallow import model_config
from keel.models.trunk_classifier import SequenceClassifier
from keel.training.plan_devices import ModelSize

MB = 1e6


@dataclass(frozen=True)
class EmptyModel:
    """A model of a run without weights."""

    model: Module
    learns: bool
    owns_base: bool = True  # False: on one device its frozen weights are in the memory of the policy's


def resident(config: PlanConfig) -> dict[str, dict[str, float]]:
    """Compute the MB of weights, gradients and optimizer state of each model on one device."""
    return {name: _megabytes(each) for name, each in _empty_models(config)}


def model_sizes(config: PlanConfig) -> dict[str, ModelSize]:
    """Count the weights of each model of a run."""
    return {name: count_weights(each.model, each.learns, each.owns_base) for name, each in _empty_models(config)}


def count_weights(model: Module, learns: bool, owns_base: bool = True) -> ModelSize:
    """Count the weights of a model, and of the layers that are gathered one by one when it is divided."""
    layers = [list(m.parameters()) for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    inside = {weight for layer in layers for weight in layer}
    outside = [weight for weight in model.parameters() if weight not in inside]
    largest = max(layers, key=_count, default=[])
    trained, trained_layer, trained_outside = (
        _count([w for w in weights if w.requires_grad]) * learns
        for weights in (list(model.parameters()), largest, outside)
    )
    itemsize = min(weight.dtype.itemsize for weight in model.parameters())
    return ModelSize(
        layers=_count(list(inside)),
        layer=_count(largest),
        outside=_count(outside),
        trained=trained,
        trained_layer=trained_layer,
        trained_outside=trained_outside,
        itemsize=itemsize,
        shares_base=not owns_base,
    )


def base_size(config: PlanConfig) -> ModelSize:
    """Count the weights of the policy without an adapter."""
    return count_weights(empty_model(config.policy.model, AutoModelForCausalLM, config.policy.dtype), learns=False)


def empty_model(source: str, kind: Any, dtype: str = "float32") -> Any:
    """Build a model on the meta device."""
    with torch.device("meta"):
        return kind.from_config(model_config(source, kind), dtype=DTYPES[dtype])


def _empty_models(config: PlanConfig) -> Iterator[tuple[str, EmptyModel]]:
    policy = config.policy
    yield "policy", EmptyModel(_trained(policy.model, AutoModelForCausalLM, config, "CAUSAL_LM"), learns=True)
    if ALGORITHMS[config.algorithm.name].needs_critic and config.critic.sharing == "separate":
        sources = {"policy": policy.model, "reward": next((r.model for r in config.rewards if r.model), None)}
        source = str(sources.get(config.critic.init, config.critic.init))
        owns_base = policy.lora is None or source != policy.model
        yield "critic", EmptyModel(_trained(source, SequenceClassifier, config, "SEQ_CLS"), True, owns_base)
    shares_policy = policy.lora is not None and config.reference is None
    if not shares_policy and config.measures_kl:
        source = config.reference or policy.model
        yield "reference", EmptyModel(empty_model(source, AutoModelForCausalLM, policy.dtype), learns=False)
    for reward in config.rewards:
        if reward.model:
            model = empty_model(reward.model, SequenceClassifier, reward.dtype)
            yield f"reward {reward.name}", EmptyModel(model, learns=False)


def _trained(source: str, kind: Any, config: PlanConfig, task: str) -> Any:
    """Build a trained model on the meta device, with the run's adapter."""
    model, policy = empty_model(source, kind, config.policy.dtype), config.policy
    with torch.device("meta"):
        return with_lora(model, policy.lora, task, policy.quantization) if policy.lora else model


def _count(weights: list[Parameter]) -> int:
    return sum(weight.numel() for weight in weights)


def _megabytes(empty: EmptyModel) -> dict[str, float]:
    size = {p: p.numel() * p.dtype.itemsize / MB for p in empty.model.parameters()}
    trained = [p for p in size if p.requires_grad and empty.learns]
    weights = sum(size.values()) if empty.owns_base else sum(size[p] for p in trained)
    gradients = 4 / MB * sum(p.numel() for p in trained)  # gradients, moments and masters are float32
    masters = 4 / MB * sum(p.numel() for p in trained if needs_master(p))
    return {"weights": weights, "gradients": gradients, "optimizer": 2 * gradients + masters}
