"""Which PPO run fits on which devices, on paper: `python benchmarks/plan_table.py` writes the table of docs/scaling.md.

The models are those of Qwen2.5 and Llama 3. Their sizes are counted on the meta device, without weights. The
weights, gradients and moments are exact; activations, logits and the cache of the sampler are estimates for one
micro-batch. Each device samples 16 responses, and has 80 GB.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from keel.config.sections import LoraSettings
from keel.models.adapters import with_lora
from keel.models.trunk_classifier import SequenceClassifier
from keel.training.plan_devices import (
    UPDATE,
    ModelSize,
    divided_bytes,
    gathered_bytes,
    gradient_bytes,
    undivided_bytes,
)
from keel.training.plan_sizes import count_weights

GB, BUDGET = 1e9, 80.0
DEVICES = 1, 8, 64
ROWS, TOKENS, MICROBATCH = 16, 1024, 16_384  # responses of a device, tokens with their prompt, tokens of a micro-batch
LOGITS = 2**27  # keel.models.heads.LOGITS_AT_ONCE on a GPU
RESERVE = 0.9  # share of the memory that a run can use: the rest is CUDA, NCCL and fragments of the allocator
PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- table of benchmarks/plan_table.py -->", "<!-- end of the table -->"

# hidden size, intermediate size, layers, heads, heads of keys and values, vocabulary, tied
SHAPES: dict[str, tuple[type, int, int, int, int, int, int, bool]] = {
    "0.5B": (Qwen2Config, 896, 4864, 24, 14, 2, 151_936, True),
    "1.5B": (Qwen2Config, 1536, 8960, 28, 12, 2, 151_936, True),
    "7B": (Qwen2Config, 3584, 18_944, 28, 28, 4, 152_064, False),
    "14B": (Qwen2Config, 5120, 13_824, 48, 40, 8, 152_064, False),
    "32B": (Qwen2Config, 5120, 27_648, 64, 40, 8, 152_064, False),
    "70B": (LlamaConfig, 8192, 28_672, 80, 64, 8, 128_256, False),
}
WAYS = "separate critic", "shared critic", "LoRA, shared critic"


def model_config(name: str) -> PretrainedConfig:
    kind, hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SHAPES[name]
    return kind(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        num_labels=1,
    )


def run_sizes(config: PretrainedConfig, way: str) -> dict[str, ModelSize]:
    """Count the weights of a PPO run with a reward model of the policy's size, all computing in bfloat16."""
    with torch.device("meta"):
        policy = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        classifier = SequenceClassifier.from_config(config, dtype=torch.bfloat16)
        frozen = {"reward model": count_weights(classifier, learns=False)}
        if way.startswith("LoRA"):
            adapted = with_lora(policy, LoraSettings(), "CAUSAL_LM")
            return {"policy": count_weights(adapted, learns=True), **frozen}
        frozen["reference"] = count_weights(policy, learns=False)
        critic = {} if way == "shared critic" else {"critic": count_weights(classifier, learns=True)}
        return {"policy": count_weights(policy, learns=True), **critic, **frozen}


def activation_bytes(config: PretrainedConfig, gradients: bool) -> float:
    """Estimate the bytes of a micro-batch: one layer, logits, and for gradients the inputs of all layers."""
    kv = 2 * config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    layer = 8 * config.hidden_size + 2 * kv + 5 * config.intermediate_size
    inputs = config.num_hidden_layers * config.hidden_size if gradients else 0
    return 2.0 * MICROBATCH * (inputs + layer) + 3 * 4 * LOGITS


def cache_bytes(config: PretrainedConfig) -> float:
    """Return the bytes of the sampler's cache of keys and values."""
    kv = 2 * config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    return 2.0 * ROWS * TOKENS * kv * config.num_hidden_layers


def phase_bytes(config: PretrainedConfig, sizes: dict[str, ModelSize], devices: int) -> dict[str, float]:
    """Return the peak of each phase on one of `devices` devices that share one copy of the weights."""
    rest = {"sample": cache_bytes(config), UPDATE: activation_bytes(config, True)}
    peaks = {}
    for phase in ("sample", "score", "targets", UPDATE):
        if devices == 1:
            weights = sum(undivided_bytes(size, phase) for size in sizes.values())
        else:
            weights = sum(divided_bytes(size, phase, devices) for size in sizes.values())
            weights += gathered_bytes(sizes, phase)
        weights += sum(gradient_bytes(sizes, phase).values()) / devices
        peaks[phase] = weights + rest.get(phase, activation_bytes(config, False))
    return peaks


def cell(config: PretrainedConfig, sizes: dict[str, ModelSize], devices: int) -> str:
    """Return the GB of the largest phase, in bold if it fits, and the phase."""
    peaks = phase_bytes(config, sizes, devices)
    phase = max(peaks, key=lambda name: peaks[name])
    gigabytes = peaks[phase] / GB
    text = f"{gigabytes:,.0f} ({phase})"
    return f"**{text}**" if gigabytes <= RESERVE * BUDGET else text


def table() -> str:
    """Return the table as Markdown."""
    heads = ["model", "PPO with", *(f"{count} device{'s' * (count > 1)}" for count in DEVICES)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * 2 + "|--:" * len(DEVICES) + "|"]
    for name in SHAPES:
        for way in WAYS:
            config = model_config(name)
            sizes = run_sizes(config, way)
            lines.append("| " + " | ".join([name, way, *(cell(config, sizes, count) for count in DEVICES)]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Replace the table between the marks in the page."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
