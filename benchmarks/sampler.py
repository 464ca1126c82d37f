"""Compare keel's sampler with `generate` of transformers, alternately, on the same prompts.

    python benchmarks/sampler.py --sizes 7M --stories FOLDER --openings openings.jsonl

tokens/s counts sampled tokens up to the end token; gap is the largest difference of a token's log-probability between
keel's sampler and a training pass over the same responses.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tasks import SHAPES, Task, random_task, story_task

from keel.data.prompts import load_prompts
from keel.learn.targets import analyze_all
from keel.models.actor_critic import ActorCritic
from keel.models.loading import end_token_ids, load_causal_lm, load_tokenizer
from keel.rollout.sampler import sample_rollouts


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    table = Table("", "tokens", "keel tokens/s", "generate tokens/s", "ratio", "gap")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tasks = [random_task(SHAPES[name], folder, natural=True) for name in options.sizes]
        tasks += [story_task(Path(model), Path(options.openings), folder) for model in options.stories]
        for task in tasks:
            table.add_row(task.name, *measure(task, options.rounds))
    Console().print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["7M"], choices=list(SHAPES), help="random models")
    parser.add_argument("--stories", nargs="*", default=[], metavar="FOLDER", help="pre-trained models")
    parser.add_argument(
        "--openings", metavar="FILE", help="prompts for the pre-trained models: jsonl with a column `prompt`"
    )
    parser.add_argument("--rounds", type=int, default=5, help="batches of each side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    if options.stories and not options.openings:
        parser.error("--stories needs --openings")
    return options


@torch.no_grad()
def measure(task: Task, rounds: int) -> list[str]:
    """Measure both sides on the same batches of prompts. The first batch is not counted."""
    model, tokenizer = load_causal_lm(task.policy), load_tokenizer(task.policy)
    prompts = load_prompts(task.prompts, tokenizer)
    ends = end_token_ids(model, tokenizer)
    plain: Any = type(model).from_pretrained(task.policy).eval()
    rates: dict[str, list[float]] = {"keel": [], "generate": []}
    tokens, gap = 0, 0.0
    for turn in range(rounds + 1):
        batch = prompts[turn * task.batch_size : (turn + 1) * task.batch_size]
        numbers = torch.rand(task.batch_size, task.max_response_tokens, dtype=torch.float64)
        ours, seconds = clocked(lambda: sample_rollouts(model, batch, tokenizer, numbers, ends))  # noqa: B023
        inputs = {"input_ids": ours.prompt_tokens, "attention_mask": ours.prompt_mask.long()}
        limits = {"max_new_tokens": task.max_response_tokens, "pad_token_id": int(tokenizer.pad_token_id or 0)}
        drawing = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "eos_token_id": ends}
        theirs, slower = clocked(lambda: plain.generate(**inputs, **limits, **drawing))  # noqa: B023
        answers = theirs[:, ours.prompt_tokens.shape[1] :]
        ended = torch.isin(answers, torch.tensor(ends)).cumsum(1)
        if turn:
            tokens += int(ours.lengths.sum())
            rates["keel"].append(int(ours.lengths.sum()) / seconds)
            rates["generate"].append(int((ended == 0).sum() + (ended.max(1).values > 0).sum()) / slower)
            trained = analyze_all(ActorCritic(model), ours, 1.0, 16_384).logprobs
            gap = max(gap, float((trained - ours.logprobs)[ours.response_mask].abs().max()))
    fast, slow = (statistics.median(rates[side]) for side in ("keel", "generate"))
    return [str(tokens // rounds), f"{fast:,.0f}", f"{slow:,.0f}", f"{fast / slow:.2f}", f"{gap:.1e}"]


def clocked(act: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return act(), time.perf_counter() - start


if __name__ == "__main__":
    main()
