"""Sample responses of a model to the prompts of a file, for `keel sample` and `keel evaluate`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from keel.config import DecodingSettings, PromptSettings, SampleConfig
from keel.data.batches import Rollouts
from keel.data.prompts import Prompt, rows_of_varied_length
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
from keel.world import ALONE, World, generator

STALE = {"responses", "ranks", "scores", "completion", "chosen", "rejected", "margin"}
"""Columns of the prompt file that describe other responses than the sampled ones; they are not written."""
CHECKED_TOKENS = 32
"""Largest number of tokens of a response on which sampler and full forward pass are compared."""
PASS_TOKENS = 16_384
"""Tokens of one forward pass, padding included; no metric depends on it."""


@dataclass(frozen=True)
class EvaluatedPolicy:
    """A model with its tokenizer, end tokens and prompts."""

    name: str
    model: ActorCritic
    tokenizer: PreTrainedTokenizerBase
    end_ids: list[int]
    prompts: list[Prompt]
    stop_texts: tuple[str, ...] = ()  # texts of several tokens that end a response as the end tokens do

    def sample_responses(
        self, decoding: DecodingSettings, *stream: int | str, world: World = ALONE
    ) -> Iterator[Rollouts]:
        """Yield batches of responses, those to one prompt adjacent.

        The random numbers of a response depend neither on the batch size nor on the number of processes, so neither
        does the response.

        Args:
            world: processes that share the prompts; this one samples for its share.
        """
        share, k = world.share(len(self.prompts)), decoding.num_responses
        prompts = [prompt for prompt in self.prompts[share] for _ in range(k)]
        numbers = generator(*stream)
        torch.rand(share.start * k, decoding.max_response_tokens, generator=numbers, dtype=torch.float64)  # of others
        for start in range(0, len(prompts), decoding.batch_size):
            batch = prompts[start : start + decoding.batch_size]
            uniforms = torch.rand(len(batch), decoding.max_response_tokens, generator=numbers, dtype=torch.float64)
            yield sample_rollouts(
                self.model.policy,
                batch,
                self.tokenizer,
                uniforms,
                self.end_ids,
                decoding.temperature,
                decoding.top_k,
                decoding.top_p,
                decoding.stop_in_text,
                self.stop_texts,
            )


def sample_responses(config: SampleConfig) -> dict[str, Any]:
    """Sample responses and write rows `{"prompt": ..., "responses": [...]}` with the prompts' other columns.

    Returns the output file, the counts and the share of truncated responses.
    """
    World.from_environment()
    require_writable(config.output)
    policy, decoding = load_policy(config.model, config.prompts, config.sampling, config.dtype), config.sampling
    texts: list[str] = []
    truncated = 0
    with ProgressDisplay("sample", len(policy.prompts) * decoding.num_responses) as display:
        for rollouts in policy.sample_responses(decoding, config.seed, "sample"):
            texts += rollouts.texts
            truncated += int(rollouts.truncated.sum())
            display.show(len(texts), {"truncated": truncated / len(texts)})
    lines = []
    for prompt, responses in zip(policy.prompts, group_texts(texts, decoding.num_responses), strict=True):
        others = {name: value for name, value in prompt.columns.items() if name not in STALE}
        row = {**others, config.prompts.column: prompt.content, "responses": responses}
        lines.append(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    write_atomic(Path(config.output), "".join(lines))
    return {
        "output": config.output,
        "prompts": len(policy.prompts),
        "responses": len(texts),
        "truncated": truncated / len(texts),
    }


def load_policy(
    name: str, prompts: PromptSettings, decoding: DecodingSettings, dtype: str = "float32"
) -> EvaluatedPolicy:
    """Load a model from a folder or the hub, and read the prompts with its tokenizer.

    Raises ConfigError or DataError.
    """
    tokenizer = chat_tokenizer(name, prompts)
    loaded = read_prompts(prompts, tokenizer)
    model = load_frozen_model(name, dtype)
    end_responses_at_turns(model.policy, tokenizer, prompts)
    report_unembedded_ids(model.policy, tokenizer, name)
    require_embeddings(model.policy, [prompt.tokens for prompt in loaded], tokenizer, prompts.path)
    longest = max(len(prompt.tokens) for prompt in loaded)
    require_positions(model.policy, longest, decoding.max_response_tokens, name, "sampling")
    end_ids = end_token_ids(model.policy, tokenizer, decoding.stop, where="sampling.stop")
    texts = tuple(stop_texts(tokenizer, decoding.stop, where="sampling.stop"))
    policy = EvaluatedPolicy(name, model, tokenizer, end_ids, loaded, texts)
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
    return ActorCritic(model.to(World.from_environment().device).requires_grad_(False))


def group_texts(texts: list[str], k: int) -> list[list[str]]:
    return [texts[start : start + k] for start in range(0, len(texts), k)]
