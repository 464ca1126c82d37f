"""A policy behind an OpenAI-compatible address, for `keel sample` and `keel evaluate`.

Its address is http(s)://HOST/PATH#MODEL, in the place of a model folder. Only texts are known of its responses, so they
have scores, lengths and win rates, and no log-probabilities, entropy or KL.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from keel.config import DecodingSettings, PromptSettings
from keel.data.batches import Rollouts
from keel.data.padding import pad_rows
from keel.data.prompts import Prompt
from keel.endpoints.client import EndpointClient
from keel.errors import ConfigError, EngineError
from keel.models.prompt_reading import chat_tokenizer, read_prompts
from keel.rollout.engine import Draws
from keel.world import ALONE, World


@dataclass(frozen=True, kw_only=True)
class EndpointRollouts(Rollouts):
    """Responses of an endpoint. Their tokens are those of another model's tokenizer."""

    num_tokens: Tensor  # [B], as the endpoint counts them


@dataclass(frozen=True)
class EndpointPolicy:
    """A model behind an address, with its prompts."""

    name: str
    client: EndpointClient
    tokenizer: PreTrainedTokenizerBase  # of another model: it limits the prompts, and gives scorers token ids
    prompts: list[Prompt]

    def sample_responses(
        self, decoding: DecodingSettings, *stream: int | str, world: World = ALONE
    ) -> Iterator[EndpointRollouts]:
        """Yield batches of responses, those to one prompt adjacent.

        Each request has a seed of its own. Whether equal seeds give equal responses depends on the endpoint.

        Args:
            world: processes that share the prompts; this one samples for its share.
        """
        share, k = world.share(len(self.prompts)), decoding.num_responses
        rows = range(share.start * k, share.stop * k)
        for start in range(0, len(rows), decoding.batch_size):
            chosen = rows[start : start + decoding.batch_size]
            prompts = [self.prompts[row // k] for row in chosen]
            seeds = Draws(stream, len(self.prompts) * k, chosen).seeds()
            pairs = zip(prompts, seeds, strict=True)
            replies = self.client.complete([completion_body(prompt, seed, decoding) for prompt, seed in pairs])
            yield self._collect(prompts, [read_reply(reply, self.name) for reply in replies])

    def _collect(self, prompts: list[Prompt], responses: Sequence["EndpointResponse"]) -> EndpointRollouts:
        pad_id = int(self.tokenizer.pad_token_id)
        texts = [response.text for response in responses]
        ids = [self.tokenizer.encode(text, add_special_tokens=False) or [pad_id] for text in texts]
        prompt_tokens, prompt_mask = pad_rows([prompt.tokens for prompt in prompts], pad_id, side="left")
        tokens, mask = pad_rows(ids, pad_id)
        return EndpointRollouts(
            prompts=prompts,
            prompt_tokens=prompt_tokens,
            prompt_mask=prompt_mask,
            response_tokens=tokens,
            response_mask=mask,
            logprobs=torch.full(tokens.shape, torch.nan),
            truncated=torch.tensor([response.truncated for response in responses]),
            texts=texts,
            num_tokens=torch.tensor([response.num_tokens for response in responses], dtype=torch.float64),
        )


@dataclass(frozen=True)
class EndpointResponse:
    text: str
    truncated: bool
    num_tokens: int


def is_endpoint(name: str | None) -> bool:
    """Whether a policy is an address, and not a folder or hub id."""
    return name is not None and name.startswith(("http://", "https://"))


def reading_model(candidates: Sequence[str | None]) -> str:
    """Return the first model whose tokenizer can read the prompts. Raises ConfigError without any."""
    for name in candidates:
        if name is not None and not is_endpoint(name):
            return name
    raise ConfigError("an endpoint has no tokenizer that could read the prompts", "tokenizer", "name a model")


def load_endpoint(address: str, tokenizer: str, prompts: PromptSettings, decoding: DecodingSettings) -> EndpointPolicy:
    """Read the prompts for an endpoint, and check its address.

    Args:
        tokenizer: model whose tokenizer limits the prompts.

    Raises ConfigError for an address, prompts or a decoding that an endpoint cannot serve.
    """
    url, _, model = address.partition("#")
    if not model:
        raise ConfigError("the address names no model", address, "write it as http://HOST/v1#MODEL")
    if decoding.top_k:
        raise ConfigError("an endpoint has no top_k", "sampling.top_k", "leave it out, or use sampling.top_p")
    reader = chat_tokenizer(tokenizer, prompts)
    return EndpointPolicy(address, EndpointClient(url.rstrip("/"), model), reader, read_prompts(prompts, reader))


def completion_body(prompt: Prompt, seed: int, decoding: DecodingSettings) -> dict[str, Any]:
    """Return the body of a request for one response: to messages, or to a plain text."""
    content = prompt.content
    task: dict[str, Any] = {"prompt": content} if isinstance(content, str) else {"messages": content}
    return {
        **task,
        "max_tokens": decoding.max_response_tokens,
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "seed": seed % 2**31,  # some servers take 32 bits
        **({"stop": decoding.stop} if decoding.stop else {}),
    }


def read_reply(reply: Any, where: str) -> EndpointResponse:
    """Return the response in a reply. Raises EngineError for a reply without text, reason or number of tokens."""
    try:
        (choice,) = reply["choices"]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        reason, count = choice["finish_reason"], reply["usage"]["completion_tokens"]
    except (KeyError, TypeError, ValueError):
        raise EngineError("the reply has no text, finish reason or number of tokens", where) from None
    if not isinstance(text, str) or type(count) is not int or count < 0:
        raise EngineError("the reply has no text or no number of tokens", where)
    if reason not in ("stop", "length"):
        raise EngineError(f"a response ended for the reason {reason!r}", where, "leave out its prompt")
    return EndpointResponse(text, reason == "length", count)
