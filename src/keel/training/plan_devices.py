"""Compute the memory and traffic of each device when the weights are divided among several (`keel plan --devices`).

It is arithmetic on the sizes of the models. What does not depend on the number of devices, such as activations, the
cache of the sampler and the libraries, is measured by `keel.training.probe` on one device with the device's share of
the batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

TRAINED_BYTES = 12
"""Bytes of a trained weight, and in a checkpoint: weight and two moments, all float32."""
MASTER = 4
"""Bytes of a float32 number"""
START, SAMPLE, SCORE, TARGETS, UPDATE = "start", "sample", "score", "targets", "update"
PHASES = START, SAMPLE, SCORE, TARGETS, UPDATE


@dataclass(frozen=True)
class ModelSize:
    """Numbers of weights of a model, and of those that are trained."""

    layers: int  # of all layers
    layer: int  # of the largest layer
    outside: int  # embeddings, norms and heads, which are gathered together
    trained: int
    trained_layer: int
    trained_outside: int
    itemsize: int  # bytes of a weight in the number format for computing
    shares_base: bool = False  # on one device its frozen weights are in the memory of the policy's

    @property
    def weights(self) -> int:
        return self.layers + self.outside

    @property
    def bytes(self) -> int:
        """Bytes of all weights in the number format for computing."""
        return self.weights * self.itemsize

    @property
    def largest_group(self) -> int:
        """Bytes of the largest group of weights that is gathered at once."""
        return max(self.layer, self.outside) * self.itemsize


@dataclass(frozen=True)
class Memory:
    """Bytes of one device in one phase."""

    divided: Mapping[str, float]  # of each model
    gathered: float
    rest: float

    @property
    def peak(self) -> float:
        return sum(self.divided.values()) + self.gathered + self.rest


def trained_weight_bytes(phase: str) -> int:
    """Return the bytes of float32 weight and moments that exist in a phase."""
    return MASTER if phase == START else TRAINED_BYTES


def undivided_bytes(size: ModelSize, phase: str) -> float:
    """Return the bytes of a model on one device. A trained 16-bit weight is there besides its float32 master."""
    frozen = 0 if size.shares_base else (size.weights - size.trained) * size.itemsize
    rounded = size.trained * size.itemsize if size.itemsize < MASTER else 0
    return frozen + rounded + size.trained * trained_weight_bytes(phase)


def divided_bytes(size: ModelSize, phase: str, shard: int) -> float:
    """Return the bytes of a model on each of `shard` devices that share one copy of its weights."""
    frozen = (size.weights - size.trained) * size.itemsize
    return (frozen + size.trained * trained_weight_bytes(phase)) / shard


def gradient_bytes(sizes: Mapping[str, ModelSize], phase: str) -> dict[str, float]:
    """Return the bytes of the gradients that exist in a phase: in the update, those of one model at a time."""
    name = max(sizes, key=lambda name: sizes[name].trained)
    return {name: float(MASTER * sizes[name].trained)} if phase == UPDATE else {}


def bytes_in_flight(size: ModelSize) -> float:
    """Return the bytes of gathered weights and undivided gradients of a pass with gradients.

    In the backward pass of a layer, these are its weights and those of the layer that is gathered next, its gradient
    and a float32 copy of it for the reduction, besides the weights outside the layers and the gradient of the head. In
    the end, they are the weights outside the layers with their gradient and its copy.
    """
    reduced = size.itemsize + MASTER
    layer = 2 * size.layer * size.itemsize + size.trained_layer * reduced
    outside = size.outside * size.itemsize
    return outside + max(layer + size.trained_outside * size.itemsize, size.trained_outside * reduced)


def gathered_bytes(sizes: Mapping[str, ModelSize], phase: str) -> float:
    """Return the most bytes that a device holds of gathered weights, the buffer of the last group included.

    The policy is complete while it samples, each reward model while it scores, policy, critic and reference in turn for
    the targets, and all of these in turn in the self-check at the start. In the update one layer is complete at a time.
    """
    policy, critic = sizes["policy"], sizes.get("critic")
    if phase == UPDATE:
        return max(bytes_in_flight(size) for size in (policy, critic) if size is not None)
    scoring, reading = reward_sizes(sizes), [size for size in (policy, critic, sizes.get("reference")) if size]
    turns = {START: [*scoring, *reading], SAMPLE: [policy], SCORE: scoring, TARGETS: reading}[phase]
    return max((size.bytes + size.largest_group for size in turns), default=0.0)


def reward_sizes(sizes: Mapping[str, ModelSize]) -> list[ModelSize]:
    return [size for name, size in sizes.items() if name.startswith("reward ")]


def divided_memory(
    sizes: Mapping[str, ModelSize], peaks: Mapping[str, float], shard: int, loads_on_device: bool = False
) -> dict[str, Memory]:
    """Return the memory of each phase on each of `shard` devices that share one copy of the weights.

    Args:
        sizes: policy, and where there are any critic, reference and `reward NAME`.
        peaks: bytes of each phase on one device, with the share of the batch that each device has.
        loads_on_device: whether models are read into the device's memory, which is so on a CPU.
    """
    memory = {}
    for phase, peak in peaks.items():
        gradients = gradient_bytes(sizes, phase)
        divided = {
            name: divided_bytes(size, phase, shard) + gradients.get(name, 0.0) / shard for name, size in sizes.items()
        }
        gathered = gathered_bytes(sizes, phase)
        if phase == START and loads_on_device:
            gathered = max(gathered, loading_bytes(sizes))
        undivided = sum(undivided_bytes(size, phase) for size in sizes.values()) + sum(gradients.values())
        rest = max(0.0, peak - undivided)
        memory[phase] = Memory(divided, gathered, rest)
    return memory


def loading_bytes(sizes: Mapping[str, ModelSize]) -> float:
    """Return the most bytes of undivided models in the host's memory while one process loads.

    The processes of a machine load in turn. All reward models are read, then divided; the reference is a copy of the
    policy; the policy is divided after the critic, and trained weights become float32 before they are divided.
    """
    policy, critic, reference = sizes["policy"], sizes.get("critic"), sizes.get("reference")
    stages = [
        sum(size.bytes for size in reward_sizes(sizes)),
        policy.bytes + (reference.bytes if reference else 0),
        _widened(policy),
        policy.bytes + _widened(critic) if critic else 0,
    ]
    return float(max(stages))


def _widened(size: ModelSize) -> int:
    """Return the bytes of an undivided model whose trained weights are float32."""
    return size.trained * MASTER + (0 if size.shares_base else (size.weights - size.trained) * size.itemsize)


def checkpoint_bytes(sizes: Mapping[str, ModelSize], merged: ModelSize) -> float:
    """Return the bytes of a checkpoint: trained weights with their moments, and the policy as a model folder.

    Args:
        merged: the policy, or with an adapter its base.
    """
    return float(TRAINED_BYTES * sum(size.trained for size in sizes.values()) + merged.bytes)


def moved_bytes(
    sizes: Mapping[str, ModelSize], devices: int, shard: int, passes: int, lora_reference: bool = False
) -> dict[str, float]:
    """Return the bytes that each device receives in each phase of a step.

    Gathering P weights moves (1 - 1/S) of their bytes, and so does the reduction of their float32 gradient. If several
    groups of devices have a copy of the weights each, they also add up the shards of their gradients.

    Args:
        devices: all devices.
        shard: S, devices that share one copy of the weights.
        passes: micro-batches of a step, each with a forward and a backward pass.
        lora_reference: whether the reference is the policy without its adapter, which is then gathered once more.
    """
    share = 1 - 1 / shard
    copies = devices // shard
    trained = [size for name, size in sizes.items() if name in ("policy", "critic")]
    once = sum(size.bytes for size in trained)
    reference = sizes["policy"] if lora_reference else sizes.get("reference")
    gradients = MASTER * sum(size.trained for size in trained)
    reduced = gradients * (share + 2 * (1 - 1 / copies) / shard)
    again = sizes["policy"].bytes * share  # the updated policy reads a few responses again
    return {
        SAMPLE: sizes["policy"].bytes * share,
        SCORE: sum(size.bytes for size in reward_sizes(sizes)) * share,
        TARGETS: (once + (reference.bytes if reference else 0)) * share,
        UPDATE: passes * (2 * once * share + reduced) + again,
    }
