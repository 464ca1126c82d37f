"""VllmEngine: sample with vLLM, whose weights are replaced by those of the policy before every batch."""

import secrets
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from keel.data.batches import Rollouts
from keel.data.prompts import Prompt
from keel.errors import ConfigError, EngineError
from keel.models.heads import unwrap_model
from keel.models.vocabulary import fill_id, num_embeddings
from keel.rollout.engine import Draws
from keel.rollout.vllm.client import RESUME, EngineClient, EngineRefusal
from keel.rollout.vllm.folder import EngineFolder
from keel.rollout.vllm.responses import ResponseRules, collect_rollouts, completion_request, parse_completion
from keel.rollout.vllm.server import Server, ServerSettings


class VllmEngine:
    """A vLLM server of this process. It starts with the first batch.

    Each batch is sampled by weights that were sent right before it. A version label, which the server returns before
    and after the batch, shows that it has taken them and that it is the same server. The label is unique, so another
    run's server, or one that was started again, is recognised.
    """

    is_external = True

    def __init__(self, settings: ServerSettings, rules: ResponseRules, tokenizer: PreTrainedTokenizerBase) -> None:
        self.settings, self.rules, self.tokenizer = settings, rules, tokenizer
        self._server: Server | None = None
        self._run, self._updates, self._version = secrets.token_hex(8), 0, ""
        self._is_asleep = False

    def sample(
        self,
        model: Any,
        prompts: Sequence[Prompt],
        draws: Draws,
        end_ids: Sequence[int],
        max_tokens: int | None = None,
        value_head: Any = None,  # the server has none
    ) -> Rollouts:
        """Send the weights of the model, and sample one response to each prompt. Raises EngineError."""
        self.send_weights(model)
        return self.generate(model, prompts, draws, end_ids, max_tokens)

    def send_weights(self, model: Any) -> None:
        """Replace the weights of the server. Raises EngineError if the server refuses them twice.

        After a failed update some weights have no memory, and the next response would end the server. A second update
        before any response repairs that.
        """
        server = self._started(model)
        try:
            self._update(server, model)
        except EngineRefusal:
            server.require_alive()
            self._update(server, model)

    def generate(
        self,
        model: Any,
        prompts: Sequence[Prompt],
        draws: Draws,
        end_ids: Sequence[int],
        max_tokens: int | None = None,
        rules: ResponseRules | None = None,
    ) -> Rollouts:
        """Sample one response to each prompt with the weights that the server has.

        Args:
            rules: how to sample, in place of the rules of the engine.
        """
        server, rules = self._started(model), rules or self.rules
        limit = min(max_tokens or rules.max_response_tokens, rules.max_response_tokens)
        requests = [
            completion_request(prompt, seed, limit, end_ids, rules)
            for prompt, seed in zip(prompts, draws.seeds(), strict=True)
        ]
        self._check_lengths(prompts, limit)
        self._check_version(server.client)
        replies = server.client.complete(requests)
        self._check_version(server.client)
        vocabulary = num_embeddings(model)
        completions = [
            parse_completion(reply, prompt, limit, end_ids, vocabulary)
            for reply, prompt in zip(replies, prompts, strict=True)
        ]
        if self.settings.sleeps:
            server.client.post("/sleep?level=2")  # the trainer gets the memory
            self._is_asleep = True
        device = unwrap_model(model).device
        return collect_rollouts(
            prompts, completions, self.tokenizer, fill_id(model, self.tokenizer), rules.stop_in_text, device
        )

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def _started(self, model: Any) -> Server:
        if self._server is None:
            folder = EngineFolder()
            try:
                path = folder.write_model(model, self.tokenizer, self._keeps_ties)
            except BaseException:
                folder.delete()
                raise
            self._server = Server(self.settings, folder, path)
        return self._server

    @property
    def _keeps_ties(self) -> bool:
        """On a CPU, vLLM does not replace a tied output matrix, so that it gets an untied one."""
        return self.settings.devices is not None

    def _update(self, server: Server, model: Any) -> None:
        client, path = server.client, server.folder.write_model(model, None, self._keeps_ties)
        if self._is_asleep:
            client.post("/wake_up?tags=weights")
        client.post("/pause?mode=wait")
        client.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(path)}})
        self._updates += 1
        self._version = f"{self._run}-{self._updates}"
        client.post("/update_weight_version", {"new_version": self._version})
        if client.post("/reset_prefix_cache").get("success") is False:
            raise EngineError("the engine did not drop what it had read with old weights", "vLLM", RESUME)
        if self._is_asleep:
            client.post("/wake_up?tags=kv_cache")
            self._is_asleep = False
        client.post("/resume")
        self._check_version(client)

    def _check_lengths(self, prompts: Sequence[Prompt], limit: int) -> None:
        """Raise ConfigError for a prompt whose response vLLM would cut short: its rows have a fixed length."""
        longest = max(len(prompt.tokens) for prompt in prompts)
        if longest + limit > self.settings.max_model_tokens:
            raise ConfigError(
                f"a prompt has {longest} tokens, more than the longest prompt of the settings",
                "rollout.engine",
                "pass all prompts when the trainer is built",
            )

    def _check_version(self, client: EngineClient) -> None:
        version = client.get("/weight_info").get("weight_version")
        if version != self._version:
            what = f"the engine has weights {version!r}, but was sent {self._version!r}: it is another server"
            raise EngineError(what, "vLLM", RESUME)
