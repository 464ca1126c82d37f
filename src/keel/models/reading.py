"""Encode a prompt and a response for a reward model."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from keel.data.chats import render_chat
from keel.data.messages import Content, Messages, with_response, without_oldest_turn
from keel.data.prompts import split_start


@dataclass(frozen=True)
class Reading:
    """A prompt and a response that a reward model scores."""

    prompt: Content
    response: str
    truncated: bool = False  # the response did not end, so the template adds no end to it
    tools: list[Any] | None = None

    def encode(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        limit: int,
        stripped: Callable[[list[int]], list[int]],
    ) -> tuple[list[int], bool]:
        """Return at most `limit` ids, and whether the text has more.

        Args:
            stripped: removes ids at the end that the model does not read.
        """
        ids = self._ids(tokenizer, template)
        if len(ids) <= limit:
            return stripped(ids), False
        shorter = self.without_oldest_turn()
        if shorter is not None:
            return replace(self, prompt=shorter).encode(tokenizer, template, limit, stripped)[0], True
        if not isinstance(self.prompt, str):  # one turn is left: keep its end, which holds the response
            return stripped(ids[-limit:]), True
        # The tokenizer truncates the text but not the special tokens at its start.
        return stripped(tokenizer.encode(self._text(template), truncation=True, max_length=limit)), True

    def without_oldest_turn(self) -> Messages | None:
        """Return the prompt without its oldest turn; None for a text, or if there is only one turn."""
        return None if isinstance(self.prompt, str) else without_oldest_turn(self.prompt)

    def num_tokens(self, tokenizer: PreTrainedTokenizerBase, template: str) -> int:
        """Return the number of tokens without any limit."""
        return len(self._ids(tokenizer, template))

    def _ids(self, tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
        if isinstance(self.prompt, str):
            text = self._text(template)
            ids, bos = tokenizer.encode(text), [tokenizer.bos_token_id]
            # A prompt that was rendered elsewhere may begin with the start token, to which the tokenizer adds another.
            is_doubled = ids[:2] == bos * 2 and split_start(text, tokenizer)[0] == bos
            return ids[1:] if is_doubled else ids
        messages = with_response(self.prompt, self.response)
        return render_chat(messages, tokenizer, tools=self.tools, ended=not self.truncated).tokens(tokenizer)

    def _text(self, template: str) -> str:
        """Return prompt and response as one text, without the special tokens that the tokenizer adds."""
        assert isinstance(self.prompt, str)
        if self.truncated:
            template = template[: template.rindex("{response}") + len("{response}")]
        values = {"prompt": self.prompt, "response": self.response}
        return re.sub(r"\{(prompt|response)\}", lambda name: values[name[1]], template)
