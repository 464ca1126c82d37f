"""Sample responses of a model to the prompts of a file, for `keel sample` and `keel evaluate`."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from keel.config import DecodingSettings, PromptSettings, SampleConfig
from keel.data.prompts import Prompt, rows_of_varied_length
from keel.evaluation.endpoint import EndpointPolicy, is_endpoint, load_endpoint, reading_model
from keel.evaluation.engine import sampled_by_engine
from keel.evaluation.evaluated_policy import CHECKED_TOKENS, PASS_TOKENS, EvaluatedPolicy
from keel.learn.pass_check import compare_passes
from keel.models.actor_critic import ActorCritic
from keel.models.loading import end_token_ids, load_causal_lm, stop_texts
from keel.models.positions import require_positions
from keel.models.prompt_reading import chat_tokenizer, end_responses_at_turns, read_prompts
from keel.models.vocabulary import report_unembedded_ids, require_embeddings
from keel.progress import ProgressDisplay
from keel.rollout.sampler import sample_rollouts
from keel.run.folder import write_atomic
from keel.run.output import require_writable
from keel.world import ALONE, World, generator, local_device, lost_process_reported, raise_together

Show = Callable[[int, Mapping[str, float]], None]
"""Show the number of responses so far, with some metrics"""

STALE = {"responses", "ranks", "scores", "completion", "chosen", "rejected", "margin"}
"""Columns of the prompt file that describe other responses than the sampled ones; they are not written."""


def sample_responses(config: SampleConfig) -> dict[str, Any]:
    """Sample responses and write rows `{"prompt": ..., "responses": [...]}` with the prompts' other columns.

    Returns the output file, the counts and the share of truncated responses.
    """
    world = World.from_environment()
    with lost_process_reported(), ExitStack() as stack:
        world.from_main(partial(require_writable, config.output))
        policy = stack.enter_context(_policy_to_sample(config, world))
        shares = world.gather_values(raise_together(world, partial(_sample_share, policy, config, world)))
        rows = [responses for share, _ in shares for responses in share]
        world.from_main(partial(_write_rows, config, policy.prompts, rows))
    count = len(rows) * config.sampling.num_responses
    return {
        "output": config.output,
        "prompts": len(policy.prompts),
        "responses": count,
        "truncated": sum(truncated for _, truncated in shares) / count,
    }


@contextmanager
def _policy_to_sample(config: SampleConfig, world: World) -> Iterator[EvaluatedPolicy | EndpointPolicy]:
    """Load the model, with the engine of the settings; or check the address of an endpoint. Raises ConfigError."""
    settings = config.prompts, config.sampling
    if is_endpoint(config.model):
        tokenizer = reading_model([config.tokenizer])
        yield raise_together(world, partial(load_endpoint, config.model, tokenizer, *settings))
        return
    with sampled_by_engine(load_policy(config.model, *settings, config.dtype, world), config, world) as policy:
        yield policy


def _sample_share(
    policy: EvaluatedPolicy | EndpointPolicy, config: SampleConfig, world: World
) -> tuple[list[list[str]], int]:
    """Sample for this process's share of the prompts. Return the responses to each, and how many are truncated."""
    texts: list[str] = []
    truncated = 0
    with share_progress("sample", len(policy.prompts), config.sampling.num_responses, world) as show:
        for rollouts in policy.sample_responses(config.sampling, config.seed, "sample", world=world):
            texts += rollouts.texts
            truncated += int(rollouts.truncated.sum())
            show(len(texts), {"truncated": truncated / len(texts)})
    return group_texts(texts, config.sampling.num_responses), truncated


def _write_rows(config: SampleConfig, prompts: Sequence[Prompt], rows: Sequence[list[str]]) -> None:
    lines = []
    for prompt, responses in zip(prompts, rows, strict=True):
        others = {name: value for name, value in prompt.columns.items() if name not in STALE}
        row = {**others, config.prompts.column: prompt.content, "responses": responses}
        lines.append(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    write_atomic(Path(config.output), "".join(lines))


@contextmanager
def share_progress(title: str, count: int, k: int, world: World) -> Iterator[Show]:
    """Show the progress of the main process, as that of all. Yield a function of its responses so far and metrics.

    Args:
        count: number of prompts that the processes share, with k responses to each.
    """
    if not world.is_main:
        yield lambda done, metrics: None
        return
    share = world.share(count)
    with ProgressDisplay(title, count * k) as display:
        yield lambda done, metrics: display.show(done * count // (share.stop - share.start), metrics)


def load_policy(
    name: str, prompts: PromptSettings, decoding: DecodingSettings, dtype: str = "float32", world: World = ALONE
) -> EvaluatedPolicy:
    """Load a model from a folder or the hub, and read the prompts with its tokenizer.

    Args:
        world: processes that call this together. Each gets the full model; those of a machine load it in turn.

    Raises ConfigError or DataError.
    """
    tokenizer = raise_together(world, partial(chat_tokenizer, name, prompts))
    loaded = raise_together(world, partial(read_prompts, prompts, tokenizer))
    model = world.in_turn(partial(load_frozen_model, name, dtype))
    policy = EvaluatedPolicy(name, model, tokenizer, [], loaded)
    return raise_together(world, partial(_check_policy, policy, prompts, decoding))


def _check_policy(policy: EvaluatedPolicy, prompts: PromptSettings, decoding: DecodingSettings) -> EvaluatedPolicy:
    """Check that the model can respond to the prompts. Return the policy with the ends of its responses."""
    name, model, tokenizer = policy.name, policy.model.policy, policy.tokenizer
    end_responses_at_turns(model, tokenizer, prompts)
    report_unembedded_ids(model, tokenizer, name)
    require_embeddings(model, [prompt.tokens for prompt in policy.prompts], tokenizer, prompts.path)
    longest = max(len(prompt.tokens) for prompt in policy.prompts)
    require_positions(model, longest, decoding.max_response_tokens, name, "sampling")
    end_ids = end_token_ids(model, tokenizer, decoding.stop, where="sampling.stop")
    texts = tuple(stop_texts(tokenizer, decoding.stop, where="sampling.stop"))
    policy = replace(policy, end_ids=end_ids, stop_texts=texts)
    check_sampler(policy, decoding)
    return policy


def check_sampler(policy: EvaluatedPolicy, decoding: DecodingSettings) -> None:
    """Compare sampler and full pass on two prompts of different lengths. Raises ConfigError where they disagree."""
    prompts = [policy.prompts[row] for row in rows_of_varied_length(policy.prompts, 2)]
    size = len(prompts), min(decoding.max_response_tokens, CHECKED_TOKENS)
    uniforms = torch.rand(*size, generator=generator("check"), dtype=torch.float64)
    temperature = decoding.temperature or 1.0  # greedy decoding has no log-probs to compare
    rollouts = sample_rollouts(policy.model.policy, prompts, policy.tokenizer, uniforms, policy.end_ids, temperature)
    compare_passes(policy.model, rollouts, temperature, PASS_TOKENS, where=policy.name)


def load_frozen_model(name: str, dtype: str = "float32") -> ActorCritic:
    """Load a causal language model without gradients on the device of this process. Raises ConfigError."""
    model: Any = load_causal_lm(name, dtype)
    return ActorCritic(model.to(local_device()).requires_grad_(False))


def group_texts(texts: list[str], k: int) -> list[list[str]]:
    return [texts[start : start + k] for start in range(0, len(texts), k)]
