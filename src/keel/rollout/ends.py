"""What ends a response: tokens of the vocabulary, and texts of several tokens wherever a token completes one."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


class Ends:
    """The end tokens, and the texts that end a response as well.

    `window` is the number of a response's last tokens that decide whether it has ended.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ids: Sequence[int],
        texts: Sequence[str] = (),
        device: torch.device | None = None,
    ) -> None:
        self.tokenizer, self.ids, self.texts = tokenizer, frozenset(ids), tuple(texts)
        # A token holds a byte at least; one more, since many decoders drop a space before the first.
        self.window = 1 + max((len(text.encode()) for text in texts), default=0)
        self._ids = torch.tensor(list(ids), dtype=torch.long, device=device)
        self._pieces: dict[int, str] = {}

    def rows_at_end(self, tails: Tensor) -> Tensor:
        """Return which rows end with their last token, of tokens [B, up to `window`]. -> [B]"""
        by_token = torch.isin(tails[:, -1], self._ids)
        if not self.texts:
            return by_token
        by_text = [self._completes(tail) for tail in tails.tolist()]
        return by_token | torch.tensor(by_text, device=tails.device)

    def without(self, text: str, length: int) -> str:
        """Return a text without the end that its last token completed, and what follows; `length` characters came
        before that token."""
        found = [(text.rfind(end), len(end)) for end in self.texts]
        return text[: min((at for at, size in found if at >= 0 and at + size > length), default=len(text))]

    def _completes(self, tail: list[int]) -> bool:
        """Whether the last of these tokens completes a text. Most are ruled out by their own characters."""
        piece = self._pieces.get(tail[-1])
        if piece is None:
            piece = self._pieces[tail[-1]] = str(self.tokenizer.decode(tail[-1:]))
        may = "\ufffd" in piece or any(text[-1] in piece for text in self.texts)  # U+FFFD: a part of a character
        return may and any(text in str(self.tokenizer.decode(tail)) for text in self.texts)
