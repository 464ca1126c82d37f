"""The reward model: text in, one score out. It reads with its own tokenizer and its own template."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from keel.data.padding import microbatches, pad_rows
from keel.data.prompts import render_chat
from keel.data.rows import Content
from keel.errors import ConfigError
from keel.models.adapters import Lora, save_adapter, with_lora
from keel.models.heads import plain
from keel.models.loading import load_classifier, load_tokenizer, save_model
from keel.models.packed import moved_left, reads_packed, token_states
from keel.world import World

TEMPLATE = "{prompt}{response}"
MICROBATCH_TOKENS = 16_384
PASSES = 8
"""Forward passes of a micro-batch for a model that reads padding, each over texts of like length."""


class RewardModel:
    """A sequence classifier with one label, on any trunk: a decoder is read at its last token, an encoder as it pools.

    Its scores are those of the plain transformers model on each text alone, whatever the padding.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, template: str = TEMPLATE, max_tokens: int | None = None
    ) -> None:
        if "{response}" not in template:
            raise ConfigError(f"template {template!r} does not hold {{response}}")
        self.model, self.tokenizer, self.template = model, tokenizer, template
        positions = getattr(plain(model).config.get_text_config(), "max_position_embeddings", None)
        limits = (tokenizer.model_max_length, positions, max_tokens)
        tokenizer.model_max_length = min(limit for limit in limits if limit)  # saved with the tokenizer
        tokenizer.truncation_side = "left"

    @classmethod
    def load(
        cls,
        name: str,
        dtype: str = "float32",
        template: str | None = None,
        lora: Lora | None = None,
        max_tokens: int | None = None,
        device: torch.device | None = None,
    ) -> Self:
        """A saved reward model, with the template it was trained with, or any model under a new head.

        Raises ConfigError when it cannot be loaded or scores otherwise than the plain transformers model.
        """
        model: Any = load_classifier(name, dtype)
        saved_template = getattr(model.config, "keel_template", TEMPLATE)
        if lora:
            model = with_lora(model, lora, "SEQ_CLS")
        model.to(device or World.from_environment().device)
        reward_model = cls(model, load_tokenizer(name), template or saved_template, max_tokens)
        reward_model._check_scores()
        return reward_model

    def save(self, folder: Path) -> None:
        """A plain transformers folder; the template lies in its config.json as `keel_template`.

        An adapter is merged in, and lies alone in the folder `adapter` too.
        """
        plain(self.model).config.keel_template = self.template
        save_model(self.model, self.tokenizer, folder)
        if hasattr(self.model, "peft_config"):
            save_adapter(self.model, self.tokenizer, folder / "adapter")

    def encode(self, prompt: Content, response: str) -> list[int]:
        """Ids of prompt and response in the template; a text that is too long loses its beginning."""
        if isinstance(prompt, str):
            values = {"prompt": prompt, "response": response}
            text = re.sub(r"\{(prompt|response)\}", lambda name: values[name[1]], self.template)
        else:
            text = render_chat([*prompt, {"role": "assistant", "content": response}], self.tokenizer)
        ids = self.tokenizer.encode(text, add_special_tokens=isinstance(prompt, str), truncation=True)
        return self._without_trailing_pads(ids)

    def score(self, prompts: Sequence[Content], responses: Sequence[str]) -> Tensor:
        """Scores of the responses, on the CPU and without gradient. -> [N] float32"""
        return self.score_rows([self.encode(*pair) for pair in zip(prompts, responses, strict=True)])

    @torch.no_grad()
    def score_rows(self, rows: Sequence[Sequence[int]], microbatch_tokens: int = MICROBATCH_TOKENS) -> Tensor:
        """Scores of encoded texts, on the CPU and without gradient. -> [N] float32

        Each distinct text is scored once: two copies in batches of other shapes would differ by rounding.
        """
        if not rows:
            return torch.empty(0)
        places: dict[tuple[int, ...], int] = {}
        index = [places.setdefault(tuple(row), len(places)) for row in rows]
        scores = self.scores_of_rows(list(places), microbatch_tokens).float().cpu()
        return scores[torch.tensor(index)]

    def scores_of_rows(self, rows: Sequence[Sequence[int]], microbatch_tokens: int) -> Tensor:
        """Scores of encoded texts, with gradient; texts of like length go through the model together. -> [N]"""
        at_once = microbatch_tokens if reads_packed(self.model) else microbatch_tokens // PASSES
        groups = microbatches([len(row) for row in rows], at_once)
        scores = [self.scores_of(*self.pad([rows[i] for i in group])) for group in groups]
        order = torch.tensor([i for group in groups for i in group])
        return torch.cat(scores)[order.argsort()]

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Encoded texts as tokens [N, L] and mask [N, L], where the model is."""
        tokens, mask = pad_rows(rows, plain(self.model).config.pad_token_id)
        device = plain(self.model).device
        return tokens.to(device), mask.to(device)

    def scores_of(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Scores with gradient; mask True = text, on whatever side the padding is. [N, L], [N, L] bool -> [N]"""
        model: Any = plain(self.model)
        if self.reads_last_token:
            last = mask.sum(1).cumsum(0) - 1
            return self._full(model.score(token_states(model, tokens, mask)[last])[:, 0])
        tokens, mask = moved_left(tokens, mask)
        return self._full(model(input_ids=tokens, attention_mask=mask.long()).logits[:, 0])

    @property
    def head(self) -> nn.Linear:
        """The layer that makes the score."""
        heads = [m for m in plain(self.model).modules() if isinstance(m, nn.Linear) and m.out_features == 1]
        return heads[-1]

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Multiply all scores from here on."""
        for parameter in self.head.parameters():
            parameter.mul_(factor)

    @property
    def reads_last_token(self) -> bool:
        """Decoders of transformers call their head `score`; encoders pool first and call it otherwise."""
        return getattr(plain(self.model), "score", None) is not None

    @staticmethod
    def _full(scores: Tensor) -> Tensor:
        return scores.float() if scores.dtype.itemsize < 4 else scores

    def _without_trailing_pads(self, ids: list[int]) -> list[int]:
        """transformers looks for the last id that is no pad, so a text that ended in one would be read too early."""
        pad_id = plain(self.model).config.pad_token_id
        while len(ids) > 1 and ids[-1] == pad_id:
            ids.pop()
        return ids or [pad_id]

    @torch.no_grad()
    def _check_scores(self) -> None:
        rows = [self.encode("Is it so?", answer) for answer in ("Yes.", "Certainly, as far as anyone knows.")]
        plainly = [plain(self.model)(input_ids=self.pad([row])[0]).logits[0, 0].float().item() for row in rows]
        if not torch.allclose(self.score_rows(rows), torch.tensor(plainly), rtol=1e-2, atol=1e-3):
            raise ConfigError(
                f"{type(plain(self.model)).__name__} computes its scores in a way that keel does not know",
                fix="use another architecture",
            )
