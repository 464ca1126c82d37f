"""Weights divided over a mesh of one process: the same bits as without it, and copies that are ordinary models."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from keel import kernels
from keel.errors import ConfigError
from keel.learn.optim import build_optimizer
from keel.models.heads import compute_dtype, token_statistics
from keel.models.loading import load_causal_lm, load_tokenizer, save_policy
from keel.models.packed import token_states
from keel.models.sharding import (
    forward_pass,
    gather_model,
    gathered_weights,
    idle_passes,
    is_in_lockstep,
    is_sharded,
    shard_model,
)
from keel.training.trainer import PolicyTrainer
from keel.world import World

from ..oracles.system import ONE, setup_of

TOKENS = torch.tensor([[3, 5, 2, 7], [1, 4, 4, 6]])


@pytest.fixture
def world() -> Iterator[World]:
    """One process with a mesh, so that FSDP divides the weights into one part."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World(0, 1, torch.device("cpu"), init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard")))
    finally:
        dist.destroy_process_group()


def loss_of(model: Any) -> Tensor:
    def read() -> Tensor:
        states = token_states(model, TOKENS, torch.ones_like(TOKENS, dtype=torch.bool))
        return token_statistics(model, states[:-1], TOKENS.flatten()[1:])[0]

    return -forward_pass(model, read).mean()


def weights_of(trainer: PolicyTrainer) -> dict[str, Tensor]:
    world = trainer.setup.world
    models = {"policy": trainer.setup.actor_critic.policy, "critic": trainer.setup.actor_critic.critic}
    copies = {name: gather_model(model, world) for name, model in models.items() if model is not None}
    return {f"{name}.{key}": w for name, model in copies.items() for key, w in model.named_parameters()}


def run(setup: Any) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    trainer = PolicyTrainer(setup)
    trainer.check()
    metrics = []
    for _ in range(2):
        scored = trainer.score(trainer.sample())
        metrics.append(trainer.update_weights(trainer.compute_targets(scored))[0])
    return metrics, weights_of(trainer)


@pytest.mark.parametrize(
    "settings",
    [{}, {"critic_sharing": "shared"}, {"policy_gradient_checkpointing": True}, {"policy_lora": {"r": 2}}],
    ids=lambda settings: next(iter(settings), "separate"),
)
def test_a_mesh_of_one_gives_the_same_bits(world: World, tiny_policy: Path, settings: dict[str, Any]) -> None:
    common = {"algorithm_microbatch_tokens": 30, "algorithm_update_epochs": 2, **settings}
    plain_metrics, plain = run(setup_of(tiny_policy, **common))
    metrics, sharded = run(setup_of(tiny_policy, world=world, **common))
    assert sharded.keys() == plain.keys()
    assert [name for name in plain if not torch.equal(plain[name], sharded[name])] == []
    for one, other in zip(plain_metrics, metrics, strict=True):
        clock = ("time/", "perf/")
        assert {k: v for k, v in one.items() if not k.startswith(clock)} == {
            k: v for k, v in other.items() if not k.startswith(clock)
        }


def test_the_weights_around_the_layers_are_new_after_a_step(world: World, tiny_policy: Path) -> None:
    plain, sharded = load_causal_lm(str(tiny_policy)), shard_model(load_causal_lm(str(tiny_policy)), world)
    losses = []
    for model in (plain, sharded):
        optimizer = build_optimizer([(model.parameters(), 0.01)])
        loss_of(model).backward()
        with torch.no_grad():
            loss_of(model)
        optimizer.step()
        with torch.no_grad():
            losses.append(float(loss_of(model)))
    assert losses[0] == losses[1]


def test_trained_weights_are_float32_and_copies_are_their_rounding(world: World, tiny_policy: Path) -> None:
    model = shard_model(load_causal_lm(str(tiny_policy), "bfloat16"), world)
    assert all(isinstance(w, DTensor) and w.dtype == torch.float32 for w in model.parameters())
    optimizer = build_optimizer([(model.parameters(), 1e-6)])
    loss_of(model).backward()
    assert all(w.grad.dtype == torch.float32 for w in model.parameters())
    before = {name: w.full_tensor().clone() for name, w in model.named_parameters()}
    optimizer.step()
    after = {name: w.full_tensor() for name, w in model.named_parameters()}
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert compute_dtype(model) == torch.bfloat16
    copy = gather_model(model, world)
    assert all(torch.equal(w, after[name].to(torch.bfloat16)) for name, w in copy.named_parameters())


def test_inputs_of_layers_are_not_rounded(world: World, tiny_gpt2: Path) -> None:
    model = shard_model(load_causal_lm(str(tiny_gpt2), "bfloat16"), world)
    layer, inputs = model.transformer.h[0], []
    layer.ln_1.register_forward_pre_hook(lambda _, given: inputs.append(given[0].dtype))
    with suppress(RuntimeError):  # its weights are bfloat16
        forward_pass(model, lambda: layer(torch.zeros(1, 2, 32)))
    assert inputs == [torch.float32]


def test_a_gathered_copy_is_the_model_that_was_loaded(world: World, tiny_gpt2: Path, tmp_path: Path) -> None:
    model = shard_model(load_causal_lm(str(tiny_gpt2)), world)
    assert is_sharded(model)
    copy = gather_model(model, world)
    assert not is_sharded(copy)
    assert copy.get_input_embeddings().weight is copy.get_output_embeddings().weight
    save_policy(copy, load_tokenizer(str(tiny_gpt2)), tmp_path)
    saved, original = (load_file(folder / "model.safetensors") for folder in (tmp_path, tiny_gpt2))
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in original)


def test_gathered_weights_end_the_lockstep_and_may_be_nested(world: World, tiny_policy: Path) -> None:
    model = shard_model(load_causal_lm(str(tiny_policy)), world)
    assert is_in_lockstep(model)
    with gathered_weights(model, None):
        with gathered_weights(model):
            pass
        assert not is_in_lockstep(model)
        assert idle_passes(model, 3) == 0
        assert all(type(weight) is torch.nn.Parameter for weight in model.parameters())
    assert is_in_lockstep(model)
    assert all(isinstance(weight, DTensor) for weight in model.parameters())


def test_kernels_refuse_divided_tensors(world: World, tiny_policy: Path) -> None:
    model = shard_model(load_causal_lm(str(tiny_policy)), world)
    assert not kernels.available(next(model.parameters()))


def test_without_a_mesh_a_model_stays_as_it_is(tiny_policy: Path) -> None:
    model = load_causal_lm(str(tiny_policy))
    assert shard_model(model, ONE) is model
    assert not is_sharded(model)
    assert os.environ.get("WORLD_SIZE") is None


def test_a_model_with_a_number_of_passes_that_depends_on_the_rows_is_refused(world: World, tiny_policy: Path) -> None:
    model = load_causal_lm(str(tiny_policy))
    model.keel_reads_single_rows = True
    with pytest.raises(ConfigError) as caught:
        shard_model(model, world)
    assert caught.value.where == "model"
    assert is_sharded(shard_model(model.requires_grad_(False), world))  # frozen weights are gathered before the passes
