"""Models whose weights are divided among processes, by torch's FSDP2 (`fully_shard`; Zhao et al. 2023).

Each process holds some rows of every weight. A pass with gradients gathers the weights of one layer at a time, and all
processes must make it together. For passes without gradients, `gathered_weights` gathers a whole model, in which no
process waits for another: rows and responses may then differ in length and number.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers.modeling_layers import GradientCheckpointingLayer

from keel.errors import ConfigError
from keel.models.heads import compute_dtype, trunk, unwrap_model
from keel.models.layers import has_known_layers, run_layer
from keel.models.packed import reads_single_rows
from keel.models.positions import rotation_threshold
from keel.models.quantized import quantization_name
from keel.models.rounding import widen
from keel.shards import full_tensor
from keel.world import World

ResultT = TypeVar("ResultT")


def shard_model(model: Any, world: World) -> Any:
    """Divide a model's weights among the processes of the world, and return the model. No process waits for another.

    Trained weights become float32, with float32 gradients, and the model computes in the number format that it had. In
    a world of one process without a mesh, the model is only moved to the device.

    Raises ConfigError for quantized weights, and for models to train whose number of passes depends on the rows.
    """
    if world.mesh is None:
        return model.to(world.device)
    if quantization := quantization_name(model):
        raise ConfigError(
            f"{quantization} weights cannot be divided among processes",
            where="quantization",
            fix="use one process, or leave quantization out",
        )
    trained = any(weight.requires_grad for weight in model.parameters())
    if trained and (reads_single_rows(model) or rotation_threshold(model) is not None):
        kind = type(unwrap_model(model)).__name__
        raise ConfigError(
            f"{kind} reads rows in separate passes, whose number differs between processes",
            where="model",
            fix="use one process, or another architecture",
        )
    root: Any = unwrap_model(model)
    body: Any = trunk(model)
    _records[root] = _Record(_empty_copy(model), world)
    compute = root.keel_compute_dtype = compute_dtype(model)
    _widen_trained(model)
    known = has_known_layers(body)
    layers = list(body.layers) if known else [m for m in body.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        _shard_module(layer, world.mesh, compute, run_layer if known else None)
    _shard_module(root, world.mesh, compute, _run_job)
    return model


def shard_head(head: Any, world: World) -> Any:
    """Divide the weights of a value head, and return it."""
    if world.mesh is None:
        return head.to(world.device)
    _shard_module(head, world.mesh, torch.float32, _run_job)
    _records[head] = _Record(None, world)
    return head


def is_sharded(model: Any) -> bool:
    return isinstance(unwrap_model(model), FSDPModule)


def forward_pass(model: Any, job: Callable[[], ResultT]) -> ResultT:
    """Run `job`, a pass that calls parts of the model instead of the model, with the weights around its layers."""
    run = getattr(unwrap_model(model), "_run", None)
    return job() if run is None else run(job)


@contextmanager
def gathered_weights(*models: Any) -> Iterator[None]:
    """Gather all weights of the models on every process, for passes without gradients. Every process must enter it.

    Inside, no process waits for another one.
    """
    roots: list[Any] = [unwrap_model(model) for model in models if model is not None and is_sharded(model)]
    roots = [root for root in dict.fromkeys(roots) if root not in _gathered]
    groups = [group for root in roots for group in _groups(root)]
    if roots:
        _records[roots[0]].world.wait_for_all()
    for root in roots:
        with torch.no_grad():
            root._run(lambda: None)  # the first pass of FSDP decides which module is the root
    for group in groups:
        group.set_reshard_after_forward(False, recurse=False)
        group.unshard()
    _gathered.update(dict.fromkeys(roots))
    try:
        yield
    finally:
        for group in groups:
            group.set_reshard_after_forward(True, recurse=False)
            group.reshard()
        for root in roots:
            del _gathered[root]


def is_in_lockstep(model: Any) -> bool:
    """Return whether a pass of the model calls the other processes, which must then make as many passes."""
    return is_sharded(model) and unwrap_model(model) not in _gathered


def idle_passes(model: Any, count: int) -> int:
    """Return how many passes this process must add to its `count`, so that all processes make equally many.

    Of a sharded model every process must call it, before the first of the passes.
    """
    return _records[unwrap_model(model)].world.max(count) - count if is_in_lockstep(model) else 0


def with_idle(result: Tensor, idle: Sequence[Tensor]) -> Tensor:
    """Add the outputs of idle passes at weight 0, so that their backward passes run too."""
    for output in idle:
        result = result + 0.0 * output.sum()
    return result


def gather_model(model: Any, world: World) -> Any:
    """Return an ordinary copy of a sharded model, on the CPU of the main process; None on the others.

    Every process must call it. The weights have the number format in which the model computes, and are gathered one by
    one. A model that is not sharded is returned itself.
    """
    if not is_sharded(model):
        return model if world.is_main else None
    world.wait_for_all()  # the main process may still be writing
    empty = _records[unwrap_model(model)].empty_copy
    places = dict(empty.named_parameters())
    weights: dict[int, Any] = {}
    for name, weight in model.named_parameters():
        full = full_tensor(weight.detach())
        if world.is_main:
            place = places[name]
            weights[id(place)] = nn.Parameter(full.to("cpu", place.dtype, copy=True), weight.requires_grad)
    return copy.deepcopy(empty, weights) if world.is_main else None


def gather_head(head: nn.Linear, world: World) -> Any:
    """Return an ordinary copy of a value head, on the CPU of the main process; None on the others."""
    world.wait_for_all()
    full = full_tensor(head.weight.detach())
    if not world.is_main:
        return None
    plain = nn.Linear(full.shape[1], full.shape[0], bias=False, dtype=full.dtype)
    plain.weight = nn.Parameter(full.to("cpu", copy=True))
    return plain


@dataclass(frozen=True)
class _Record:
    """What is known of a sharded model."""

    empty_copy: Any  # an ordinary model whose weights have no memory; None for a value head
    world: World


_records: WeakKeyDictionary[nn.Module, _Record] = WeakKeyDictionary()
_gathered: WeakKeyDictionary[nn.Module, None] = WeakKeyDictionary()
"""The models whose weights are gathered at the moment"""


def _shard_module(module: Any, mesh: DeviceMesh, compute: torch.dtype, run: Callable[..., Any] | None) -> None:
    """Divide the weights of a module that no shard inside it holds.

    Args:
        run: function of the module that computes with its weights, besides its forward method.
    """
    trained = any(weight.requires_grad for weight in module.parameters())
    # Inputs stay as they are: the angles of rotary positions, for example, are float32.
    mixed = MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False)
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    if run is not None:
        module._run = MethodType(run, module)
    fully_shard(
        module,
        mesh=mesh["shard"] if mesh.size(0) == 1 else mesh,
        mp_policy=mixed if trained and compute.itemsize < 4 else whole,
        reshard_after_forward=True,  # of the outermost module too: its weights would be stale after an update
    )
    if run is not None:
        register_fsdp_forward_method(module, "_run")
    # Losses are divided by the tokens of all processes, so that gradients must be added, not averaged.
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


def _run_job(_: nn.Module, job: Callable[[], ResultT]) -> ResultT:
    return job()


def _groups(root: nn.Module) -> list[Any]:
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def _empty_copy(model: Any) -> Any:
    """Return a copy whose weights have no memory; it shares the configs, which may change later."""
    base: Any = unwrap_model(model)
    configs = base.config, getattr(base, "generation_config", None)
    shared: dict[int, Any] = {id(config): config for config in configs}
    empty = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, shared | empty)


def _widen_trained(model: nn.Module) -> None:
    for weight in model.parameters():
        if weight.requires_grad and weight.dtype.itemsize < 4:
            weight.data = widen(weight)
