"""Reward models, which score a prompt with its response. Each has a tokenizer and a template."""

import copy
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
from keel.models.heads import unwrap_model
from keel.models.loading import dtype_name, load_classifier, load_tokenizer, report_merge, save_model
from keel.models.packed import left_align, reads_packed_rows, token_states
from keel.models.pad_token import separate_pad, set_pad_id
from keel.models.positions import num_positions
from keel.models.quantized import import_bitsandbytes
from keel.models.reading import Reading
from keel.models.sameness import probe_tokens, require_same
from keel.models.sharding import forward_pass, gathered_weights, idle_passes, with_idle
from keel.models.trial import trial
from keel.models.vocabulary import report_unembedded_ids, require_embeddings
from keel.world import local_device

TEMPLATE = "{prompt}{response}"
MICROBATCH_TOKENS = 16_384
PASSES = 8
"""Number of forward passes per micro-batch for a model that computes padding, each over texts of similar length."""


class RewardModel:
    """A sequence classifier with one label, on any trunk.

    The score of a decoder is read at the last token, that of an encoder after its pooling. Scores equal those of the
    plain transformers model for each text alone, with any padding.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        max_tokens: int | None = None,
    ) -> None:
        config = unwrap_model(model).config
        self.model, self.tokenizer = model, tokenizer
        self.template = str(template or getattr(config, "keel_template", TEMPLATE))
        if "{response}" not in self.template:
            raise ConfigError(
                f"template {self.template!r} does not contain {{response}}",
                where="template",
                fix="write {response} where the response belongs",
            )
        self.max_tokens: int | None = max_tokens or getattr(config, "keel_max_tokens", None)
        """Largest number of tokens of a training text. It does not limit texts that are scored."""
        self.cut: list[bool] = []
        """Whether the beginning of each text of the last call of `score` was cut."""
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
        quantization: str | None = None,
        max_tokens: int | None = None,
        device: torch.device | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Self:
        """Load a saved reward model, or any model with a new head.

        A model to train gets a separate pad token, so that the end token of a template is read. The score of a trained
        model is read where transformers reads it: before any pad tokens at the end of a text.

        Args:
            template: template of a model to train; a trained model has its template saved.
            lora: adds a new adapter.
            quantization: quantizes the base of the new adapter: "nf4" or "int8".
            max_tokens: largest number of tokens of a training row.
            device: place of the model; None: that of this process.
            tokenizer: replaces the model's tokenizer, such as by one with another chat template.

        Raises ConfigError if it cannot be loaded, or if its scores differ from those of the plain transformers model.
        """
        if quantization:
            import_bitsandbytes()
        to_train = template is not None or max_tokens is not None
        model = load_classifier(name, dtype, to_train=to_train)
        reward_model = cls(model, tokenizer or load_tokenizer(name), template, max_tokens)
        reward_model._set_pad(to_train)
        if lora:
            require_targets(model, lora)
            reward_model.model = with_lora(reward_model.model, lora, "SEQ_CLS", quantization)
        reward_model.model.to(device or local_device())
        report_unembedded_ids(reward_model.model, reward_model.tokenizer, name)
        reward_model._check_scores()
        return reward_model

    def save(self, folder: Path) -> None:
        """Save a plain transformers folder, with the template and the training limit in config.json.

        Their keys are `keel_template` and `keel_max_tokens`. An adapter is merged, and also saved separately in the
        folder `adapter`. Raises CheckpointError if the scores of the saved model differ from those of this model.
        """
        unwrap_model(self.model).config.keel_template = self.template
        unwrap_model(self.model).config.keel_max_tokens = self.max_tokens
        save_model(self.model, self.tokenizer, folder)
        places = [folder]
        if hasattr(self.model, "peft_config"):
            save_adapter(self.model, self.tokenizer, folder / "adapter")
            report_merge(self.model)
            places.append(folder / "adapter")
        rows = probe_tokens(self.model).tolist()
        for place in places:
            saved = RewardModel.load(str(place), dtype_name(self.model))
            require_same(self.score_rows(rows), saved.score_rows(rows), self.model, place)

    def with_weights(self, model: Any) -> "RewardModel":
        """Return a reward model that differs only in its weights.

        Args:
            model: the classifier that holds them, with any adapter.
        """
        other = copy.copy(self)
        other.model = model
        return other

    def encode(self, prompt: Content, response: str) -> list[int]:
        """Encode prompt and response in the template. A text that is too long for the model loses its beginning."""
        return self.encode_within(Reading(prompt, response), self.limit)[0]

    def encode_within(self, reading: Reading, limit: int) -> tuple[list[int], bool]:
        """Return at most `limit` ids of prompt and response in the template, and whether there are more.

        A chat that is too long loses its oldest turns. A text, or a chat of one turn, loses its beginning.
        """
        ids, cut = reading.encode(self.tokenizer, self.template, limit, self._without_trailing_pads)
        require_embeddings(self.model, [ids], self.tokenizer, "reward model")
        return ids, cut

    def num_tokens(self, prompt: Content, response: str) -> int:
        """Return the number of tokens of prompt and response in the template, without any limit."""
        return Reading(prompt, response).num_tokens(self.tokenizer, self.template)

    def score(self, prompts: Sequence[Content], responses: Sequence[str]) -> Tensor:
        """Score responses that have ended, on the CPU and without gradients, and set `cut`. -> [N] float32"""
        return self.score_readings([Reading(*each) for each in zip(prompts, responses, strict=True)])

    def score_readings(self, readings: Sequence[Reading]) -> Tensor:
        """Score responses that may be truncated, to prompts that may have tools, and set `cut`. -> [N] float32"""
        encoded = [self.encode_within(reading, self.limit) for reading in readings]
        self.cut = [cut for _, cut in encoded]
        return self.score_rows([row for row, _ in encoded])

    @torch.no_grad()
    def score_rows(self, rows: Sequence[Sequence[int]], microbatch_tokens: int = MICROBATCH_TOKENS) -> Tensor:
        """Score encoded texts, on the CPU and without gradients. -> [N] float32

        Of a sharded model every process must call it, with any number of rows.

        Each distinct text is scored once, since the scores of two copies in batches of other shapes would differ by
        rounding.
        """
        places: dict[tuple[int, ...], int] = {}
        index = [places.setdefault(tuple(row), len(places)) for row in rows]
        with gathered_weights(self.model):
            if not rows:
                return torch.empty(0)
            scores = self.scores_of_rows(list(places), microbatch_tokens).float().cpu()
        return scores[torch.tensor(index)]

    def scores_of_rows(self, rows: Sequence[Sequence[int]], microbatch_tokens: int) -> Tensor:
        """Score encoded texts in micro-batches of similar length, with gradients. -> [N]

        A sharded model makes as many passes on each process as on the one with the most micro-batches.
        """
        at_once = microbatch_tokens if reads_packed_rows(self.model) else microbatch_tokens // PASSES
        groups = microbatches([len(row) for row in rows], at_once)
        scores = [self.compute_scores(*self.pad([rows[i] for i in group])) for group in groups]
        idle = [self.compute_scores(*self.pad(rows[:1])) for _ in range(idle_passes(self.model, len(groups)))]
        order = torch.tensor([i for group in groups for i in group])
        return with_idle(torch.cat(scores)[order.argsort()], idle)

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Pad encoded texts to tokens [N, L] and mask [N, L], on the device of the model."""
        tokens, mask = pad_rows(rows, unwrap_model(self.model).config.get_text_config().pad_token_id)
        device = unwrap_model(self.model).device
        return tokens.to(device), mask.to(device)

    def compute_scores(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Compute scores with gradients. Padding may be on either side. Tokens [N, L], mask [N, L] bool -> [N]"""
        model: Any = unwrap_model(self.model)
        if self.reads_last_token:
            last = mask.sum(1).cumsum(0) - 1
            scores = forward_pass(model, lambda: model.score(token_states(model, tokens, mask)[last]))
            return self._widen(scores[:, 0])
        tokens, mask = left_align(tokens, mask)
        return self._widen(model(input_ids=tokens, attention_mask=mask.long()).logits[:, 0])

    @property
    def head(self) -> nn.Linear:
        """The layer whose output is the score: the last one with a single output."""
        heads = [m for m in unwrap_model(self.model).modules() if isinstance(m, nn.Linear) and m.out_features == 1]
        return heads[-1]

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Scale the head, so that all later scores are multiplied by the factor."""
        for parameter in self.head.parameters():
            parameter.mul_(factor)

    @property
    def reads_last_token(self) -> bool:
        """Whether the score is read at the last token: only decoders of transformers call their head `score`."""
        return getattr(unwrap_model(self.model), "score", None) is not None

    @staticmethod
    def _widen(scores: Tensor) -> Tensor:
        return scores.float() if scores.dtype.itemsize < 4 else scores

    def _set_pad(self, to_train: bool) -> None:
        model, pad_id = unwrap_model(self.model), unwrap_model(self.model).config.get_text_config().pad_token_id
        is_trained = bool(self.head.weight.any()) and not to_train
        if self.reads_last_token and (pad_id is None or not is_trained):
            separate_pad(model, self.tokenizer, self.template)
        elif pad_id is None:
            set_pad_id(model, int(self.tokenizer.pad_token_id))

    def _without_trailing_pads(self, ids: list[int]) -> list[int]:
        """Remove ids after the one at which transformers reads a decoder, the last that is not the pad token."""
        pad_id = unwrap_model(self.model).config.get_text_config().pad_token_id
        while self.reads_last_token and len(ids) > 1 and ids[-1] == pad_id:
            ids.pop()
        return ids or [pad_id]

    @torch.no_grad()
    def _check_scores(self) -> None:
        rows = [self.encode("Is it so?", response) for response in ("Yes.", "Certainly, as far as anyone knows.")]
        with trial(self.model):
            expected = [
                unwrap_model(self.model)(input_ids=self.pad([row])[0]).logits[0, 0].float().item() for row in rows
            ]
            scores = self.score_rows(rows)
        if not torch.allclose(scores, torch.tensor(expected), rtol=1e-3, atol=1e-4):
            raise ConfigError(
                f"{type(unwrap_model(self.model)).__name__} computes its scores in a way that keel does not support",
                fix="use another architecture",
            )
