"""A prompt and a response as a reward model reads them."""

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
    """What a reward model is to score."""

    prompt: Content
    response: str
    truncated: bool = False  # the response did not end, so nothing that ends it is read
    tools: list[Any] | None = None

    def encode(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        limit: int,
        stripped: Callable[[list[int]], list[int]],
    ) -> tuple[list[int], bool]:
        """At most `limit` ids, `stripped` of what the model does not read, and whether there are more."""
        ids = self._ids(tokenizer, template)
        if len(ids) <= limit:
            return stripped(ids), False
        shorter = self.without_oldest_turn()
        if shorter is not None:
            return replace(self, prompt=shorter).encode(tokenizer, template, limit, stripped)[0], True
        if not isinstance(self.prompt, str):
            return stripped(ids[-limit:]), True
        # the tokenizer keeps the special tokens that start a text
        return stripped(tokenizer.encode(self._text(template), truncation=True, max_length=limit)), True

    def without_oldest_turn(self) -> Messages | None:
        """Return the prompt without its oldest turn; None for a text, or where there is one turn only."""
        return None if isinstance(self.prompt, str) else without_oldest_turn(self.prompt)

    def num_tokens(self, tokenizer: PreTrainedTokenizerBase, template: str) -> int:
        """Tokens in all, also where a model cannot read so many."""
        return len(self._ids(tokenizer, template))

    def _ids(self, tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
        if isinstance(self.prompt, str):
            text = self._text(template)
            ids, bos = tokenizer.encode(text), [tokenizer.bos_token_id]
            spelled = ids[:2] == bos * 2 and split_start(text, tokenizer)[0] == bos  # rendered elsewhere
            return ids[1:] if spelled else ids
        messages = with_response(self.prompt, self.response)
        return render_chat(messages, tokenizer, tools=self.tools, ended=not self.truncated).tokens(tokenizer)

    def _text(self, template: str) -> str:
        """Prompt and response as one text, to which the tokenizer adds its special tokens."""
        assert isinstance(self.prompt, str)
        if self.truncated:
            template = template[: template.rindex("{response}") + len("{response}")]
        values = {"prompt": self.prompt, "response": self.response}
        return re.sub(r"\{(prompt|response)\}", lambda name: values[name[1]], template)
