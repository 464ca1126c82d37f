"""The reward model: text in, one score out. It reads with its own tokenizer and its own template."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from keel.data.padding import microbatches, pad_rows
from keel.data.rows import Content
from keel.errors import ConfigError
from keel.models.adapters import Lora, require_targets, save_adapter, with_lora
from keel.models.heads import plain
from keel.models.loading import dtype_name, load_classifier, load_tokenizer, save_model
from keel.models.packed import left_align, reads_packed_rows, token_states
from keel.models.pad_token import separate_pad, set_pad_id
from keel.models.positions import num_positions
from keel.models.reading import Reading
from keel.models.sameness import probe_tokens, require_same
from keel.models.vocabulary import report_unembedded_ids, require_embeddings
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
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        max_tokens: int | None = None,
    ) -> None:
        config = plain(model).config
        self.model, self.tokenizer = model, tokenizer
        self.template = str(template or getattr(config, "keel_template", TEMPLATE))
        if "{response}" not in self.template:
            raise ConfigError(
                f"template {self.template!r} does not hold {{response}}",
                where="template",
                fix="write {response} where the response belongs",
            )
        self.max_tokens: int | None = max_tokens or getattr(config, "keel_max_tokens", None)
        """Most tokens of a text that it was trained on. It limits training rows, and no text that is scored."""
        self.cut: list[bool] = []
        """For each text of the last call of `score` whether its beginning did not fit."""
        limits = {
            "tokenizer.model_max_length": tokenizer.model_max_length,
            "max_position_embeddings": num_positions(model),
        }
        self.limit, self.limited_by = min((limit, source) for source, limit in limits.items() if limit)
        tokenizer.model_max_length = self.limit  # saved with the tokenizer
        tokenizer.truncation_side, tokenizer.padding_side = "left", "right"

    @classmethod
    def load(
        cls,
        name: str,
        dtype: str = "float32",
        template: str | None = None,
        lora: Lora | None = None,
        max_tokens: int | None = None,
        device: torch.device | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Self:
        """A saved reward model, with the template it was trained with, or any model under a new head.

        A model that is to be trained gets a pad token of its own, so that the end token of a template is read. One that
        is used as it is, is read where transformers reads it: before any pad tokens that end a text.

        Args:
            template: of a model that is to be trained.
            max_tokens: most tokens of a training row.
            tokenizer: the model's own with another chat template.

        Raises ConfigError when it cannot be loaded or scores otherwise than the plain transformers model.
        """
        to_train = template is not None or max_tokens is not None
        model = load_classifier(name, dtype, to_train=to_train)
        reward_model = cls(model, tokenizer or load_tokenizer(name), template, max_tokens)
        reward_model._set_pad(to_train)
        if lora:
            require_targets(model, lora)
            reward_model.model = with_lora(reward_model.model, lora, "SEQ_CLS")
        reward_model.model.to(device or World.from_environment().device)
        report_unembedded_ids(reward_model.model, reward_model.tokenizer, name)
        reward_model._check_scores()
        return reward_model

    def save(self, folder: Path) -> None:
        """A plain transformers folder; config.json holds the template and the training limit (`keel_template`,
        `keel_max_tokens`).

        An adapter is merged in, and lies alone in the folder `adapter` too. Raises CheckpointError if what was saved
        does not score as this model does.
        """
        plain(self.model).config.keel_template = self.template
        plain(self.model).config.keel_max_tokens = self.max_tokens
        save_model(self.model, self.tokenizer, folder)
        places = [folder]
        if hasattr(self.model, "peft_config"):
            save_adapter(self.model, self.tokenizer, folder / "adapter")
            places.append(folder / "adapter")
        rows = probe_tokens(self.model).tolist()
        for place in places:
            saved = RewardModel.load(str(place), dtype_name(self.model), device=plain(self.model).device)
            require_same(self.score_rows(rows), saved.score_rows(rows), self.model, place)

    def encode(self, prompt: Content, response: str) -> list[int]:
        """Ids of prompt and response in the template; a text that is longer than the model can read loses its
        beginning."""
        return self.encode_within(Reading(prompt, response), self.limit)[0]

    def encode_within(self, reading: Reading, limit: int) -> tuple[list[int], bool]:
        """At most `limit` ids of prompt and response in the template, and whether there are more.

        A chat loses its oldest turns, and a text, or what is left of the chat, its beginning.
        """
        ids, cut = reading.encode(self.tokenizer, self.template, limit, self._without_trailing_pads)
        require_embeddings(self.model, [ids], self.tokenizer, "reward model")
        return ids, cut

    def num_tokens(self, prompt: Content, response: str) -> int:
        """Tokens of prompt and response in the template, also where the model cannot read so many."""
        return Reading(prompt, response).num_tokens(self.tokenizer, self.template)

    def score(self, prompts: Sequence[Content], responses: Sequence[str]) -> Tensor:
        """Scores of responses that have ended, on the CPU and without gradient; sets `cut`. -> [N] float32"""
        return self.score_readings([Reading(*each) for each in zip(prompts, responses, strict=True)])

    def score_readings(self, readings: Sequence[Reading]) -> Tensor:
        """As `score`, of responses that may be truncated and prompts that may have tools. -> [N] float32"""
        encoded = [self.encode_within(reading, self.limit) for reading in readings]
        self.cut = [cut for _, cut in encoded]
        return self.score_rows([row for row, _ in encoded])

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
        at_once = microbatch_tokens if reads_packed_rows(self.model) else microbatch_tokens // PASSES
        groups = microbatches([len(row) for row in rows], at_once)
        scores = [self.compute_scores(*self.pad([rows[i] for i in group])) for group in groups]
        order = torch.tensor([i for group in groups for i in group])
        return torch.cat(scores)[order.argsort()]

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Encoded texts as tokens [N, L] and mask [N, L], where the model is."""
        tokens, mask = pad_rows(rows, plain(self.model).config.get_text_config().pad_token_id)
        device = plain(self.model).device
        return tokens.to(device), mask.to(device)

    def compute_scores(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Scores with gradient; mask True = text, on whatever side the padding is. [N, L], [N, L] bool -> [N]"""
        model: Any = plain(self.model)
        if self.reads_last_token:
            last = mask.sum(1).cumsum(0) - 1
            return self._full(model.score(token_states(model, tokens, mask)[last])[:, 0])
        tokens, mask = left_align(tokens, mask)
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

    def _set_pad(self, to_train: bool) -> None:
        model, pad_id = plain(self.model), plain(self.model).config.get_text_config().pad_token_id
        is_trained = bool(self.head.weight.any()) and not to_train
        if self.reads_last_token and (pad_id is None or not is_trained):
            separate_pad(model, self.tokenizer, self.template)
        elif pad_id is None:
            set_pad_id(model, int(self.tokenizer.pad_token_id))

    def _without_trailing_pads(self, ids: list[int]) -> list[int]:
        """The ids up to the one at which transformers reads a decoder: the last that is not the pad token."""
        pad_id = plain(self.model).config.get_text_config().pad_token_id
        while self.reads_last_token and len(ids) > 1 and ids[-1] == pad_id:
            ids.pop()
        return ids or [pad_id]

    @torch.no_grad()
    def _check_scores(self) -> None:
        rows = [self.encode("Is it so?", response) for response in ("Yes.", "Certainly, as far as anyone knows.")]
        plainly = [plain(self.model)(input_ids=self.pad([row])[0]).logits[0, 0].float().item() for row in rows]
        if not torch.allclose(self.score_rows(rows), torch.tensor(plainly), rtol=1e-2, atol=1e-3):
            raise ConfigError(
                f"{type(plain(self.model)).__name__} computes its scores in a way that keel does not know",
                fix="use another architecture",
            )
