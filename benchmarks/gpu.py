"""Measure how close keel comes to the limits of a GPU, with a random model of the shape of Qwen2.5-0.5B in bfloat16.

    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --hidden 128 --layers 2 --vocabulary 4096 --batch-size 8   # a trial on a CPU

decode: tokens/s of keel's sampler and of `generate` of transformers, alternately, and the limit: every token reads all
weights and the cache of its row at the measured bandwidth. update: forward, backward and AdamW over the same responses,
as a share of the measured matrix rate. To compare with TRL, run compare_trl.py on the same machine.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tasks import FIRST_WORD, word_tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM

from keel.data.batches import Rollouts, select_rows
from keel.data.prompts import Prompt
from keel.learn.optim import build_optimizer, microbatches
from keel.models.actor_critic import ActorCritic
from keel.models.loading import load_causal_lm
from keel.rollout.sampler import sample_rollouts

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NO_END = [-1]


def main() -> None:
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = build(options, Path(folder))
        figures = {
            "bandwidth GB/s": bandwidth() / 1e9,
            "bf16 TFLOP/s": matrix_rate() / 1e12,
            **decode(model, tokenizer, options),
            **update(model, tokenizer, options),
        }
    table = Table("", "", title=torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.4g}")
    Console().print(table)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--response-tokens", type=int, default=128)
    parser.add_argument("--microbatch-tokens", type=int, default=16_384)
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of each measurement; the median is reported")
    parser.add_argument("--json", help="write all results to this file")
    return parser.parse_args()


def build(options: argparse.Namespace, folder: Path) -> tuple[Any, Any]:
    """Load the model as keel does, on the device, with a tokenizer of numbered words."""
    torch.manual_seed(0)
    heads = max(2, options.hidden // 64)
    config = Qwen2Config(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=round(options.hidden * 4864 / 896),
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    tokenizer = word_tokenizer(options.vocabulary)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_causal_lm(str(folder), "bfloat16").to(DEVICE), tokenizer


def bandwidth(size: int = 2**28) -> float:
    """Return bytes per second, read and written, of a large copy."""
    given = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    taken = torch.empty_like(given)
    return 2 * size / min(clocked(lambda: taken.copy_(given))[1] for _ in range(5))


def matrix_rate() -> float:
    """Return floating-point operations per second of a large matrix product."""
    size = 8192 if DEVICE.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / min(clocked(lambda: a @ b)[1] for _ in range(5))


def answers(model: Any, tokenizer: Any, options: argparse.Namespace) -> Rollouts:
    draw = torch.Generator().manual_seed(1)
    shape = options.batch_size, options.prompt_tokens
    rows = torch.randint(FIRST_WORD, options.vocabulary, shape, generator=draw).tolist()
    prompts = [Prompt("", "", tuple(row), {}) for row in rows]
    uniforms = torch.rand(options.batch_size, options.response_tokens, dtype=torch.float64, generator=draw)
    return sample_rollouts(model, prompts, tokenizer, uniforms, NO_END)


@torch.no_grad()
def decode(model: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, float]:
    rates: dict[str, list[float]] = {"keel": [], "generate": []}
    tokens = options.batch_size * options.response_tokens
    length = {"max_new_tokens": options.response_tokens, "min_new_tokens": options.response_tokens}
    for _ in range(options.rounds + 1):
        ours, seconds = clocked(lambda: answers(model, tokenizer, options))
        inputs = {"input_ids": ours.prompt_tokens, "attention_mask": ours.prompt_mask.long()}
        drawing = {"do_sample": True, "top_k": 0, "pad_token_id": int(tokenizer.pad_token_id)}
        _, slower = clocked(lambda: model.generate(**inputs, **length, **drawing))  # noqa: B023
        rates["keel"].append(tokens / seconds)
        rates["generate"].append(tokens / slower)
    config = model.config
    cached = (
        2 * config.num_hidden_layers * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    )
    mean_length = options.prompt_tokens + options.response_tokens / 2
    read = 2 * (sum(p.numel() for p in model.parameters()) + options.batch_size * cached * mean_length)
    limit = options.batch_size * bandwidth() / read
    fast, slow = (statistics.median(each[1:]) for each in rates.values())
    return {
        "decode: keel tokens/s": fast,
        "decode: generate tokens/s": slow,
        "decode: limit tokens/s": limit,
        "decode: share of the limit": fast / limit,
    }


def update(model: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, float]:
    rollouts, policy = answers(model, tokenizer, options), ActorCritic(model)
    optimizer = build_optimizer([(model.parameters(), 1e-7)], 0.0, 1e-8)
    lengths = (rollouts.prompt_mask.sum(1) + rollouts.lengths).tolist()

    def step() -> None:
        for rows in microbatches(lengths, options.microbatch_tokens):
            policy.analyze(select_rows(rollouts, rows), 1.0, with_values=False).logprobs.mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = statistics.median([clocked(step)[1] for _ in range(options.rounds + 1)][1:])
    head = model.get_output_embeddings().weight.numel()
    layers = sum(p.numel() for p in model.base_model.layers.parameters() if p.dim() > 1)
    work = 6 * (layers * sum(lengths) + head * int(rollouts.lengths.sum()))
    return {
        "update: seconds": seconds,
        "update: tokens/s": sum(lengths) / seconds,
        "update: share of the matrix rate": work / seconds / matrix_rate(),
    }


def clocked(act: Callable[[], Any]) -> tuple[Any, float]:
    """Call a function, and return its result and its seconds until the device is idle."""
    wait()
    start = time.perf_counter()
    result = act()
    wait()
    return result, time.perf_counter() - start


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
