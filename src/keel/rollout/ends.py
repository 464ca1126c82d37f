"""Detect the end of a response: an end token, or a token that completes a stop text of several tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


class Ends:
    """End tokens and stop texts.

    Attributes:
        window: number of last tokens of a response that decide whether it has ended.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ids: Sequence[int],
        texts: Sequence[str] = (),
        device: torch.device | None = None,
    ) -> None:
        self.tokenizer, self.ids, self.texts = tokenizer, frozenset(ids), tuple(texts)
        # A token has at least one byte. One more token is needed, since many decoders drop a leading space.
        self.window = 1 + max((len(text.encode()) for text in texts), default=0)
        self._ids = torch.tensor(list(ids), dtype=torch.long, device=device)
        self._pieces: dict[int, str] = {}

    def rows_at_end(self, tails: Tensor) -> Tensor:
        """Return which rows end with their last token. The last tokens [B, <= window] -> [B] bool"""
        by_token = torch.isin(tails[:, -1], self._ids)
        if not self.texts:
            return by_token
        by_text = [self._completes(tail) for tail in tails.tolist()]
        return by_token | torch.tensor(by_text, device=tails.device)

    def strip_stop_text(self, text: str, length: int) -> str:
        """Cut a response's text at the stop text that its last token completed.

        Args:
            length: characters before the last token.
        """
        places = [(text.rfind(end), len(end)) for end in self.texts]
        return text[: min((at for at, size in places if at >= 0 and at + size > length), default=len(text))]

    def _completes(self, tail: list[int]) -> bool:
        """Return whether the last of these tokens completes a stop text."""
        piece = self._pieces.get(tail[-1])
        if piece is None:
            piece = self._pieces[tail[-1]] = str(self.tokenizer.decode(tail[-1:]))
        # Most tokens lack the last character of every stop text and need no decoding of the tail. U+FFFD is a part of a
        # character, which could be any.
        is_candidate = "\ufffd" in piece or any(text[-1] in piece for text in self.texts)
        return is_candidate and any(text in str(self.tokenizer.decode(tail)) for text in self.texts)
