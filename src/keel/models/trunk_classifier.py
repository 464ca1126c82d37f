"""Sequence classifiers for every family of language models: transformers' class, or a score head on the trunk.

transformers has no such class for some families (Granite, Gemma 4, Cohere, OLMoE). The class that is built here for
them works like transformers' decoder classifiers: it has the same weight names, and reads the score at the last token
that is not `config.pad_token_id`.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput


class SequenceClassifier:
    """AutoModelForSequenceClassification for every family that has a language model."""

    @staticmethod
    def from_config(config: PreTrainedConfig, **options: Any) -> Any:
        """Build a model with random weights. Raises ValueError for a family without a language model."""
        config = _read_config(config)
        if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            return AutoModelForSequenceClassification.from_config(config, **options)
        return classifier_class(config)._from_config(config, **options)

    @staticmethod
    def from_pretrained(name: str, num_labels: int = 1, **options: Any) -> Any:
        """Load a saved model. A head that is not in its file has random weights."""
        config = _read_config(AutoConfig.from_pretrained(name, num_labels=num_labels, trust_remote_code=False))
        if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            return AutoModelForSequenceClassification.from_pretrained(name, config=config, **options)
        options.pop("trust_remote_code", None)
        return classifier_class(config).from_pretrained(name, config=config, **options)


def _read_config(config: Any) -> Any:
    """Return the text config inside, if the family's classifier, or else its language model, is built from it."""
    mappings: list[Any] = [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING]
    known = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
    text = config.get_text_config()
    if text is config or not known or known[0].config_class is not type(text):
        return config
    text.num_labels = config.num_labels
    return text


class TrunkClassifier(PreTrainedModel):
    """A score head without bias on a trunk. `_classifier_class` makes a subclass for each trunk."""

    trunk_class: type[PreTrainedModel]
    reads_text_config: bool  # the trunk takes the text config inside the config
    embeddings: str  # path of the embeddings in the trunk: wrappers of decoders (Marian, TrOCR) do not give it

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        text = config.get_text_config()
        self.num_labels = config.num_labels
        setattr(self, self.base_model_prefix, self.trunk_class(text if self.reads_text_config else config))
        self.score = nn.Linear(text.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @property
    def trunk(self) -> Any:
        """The part that turns tokens into hidden states."""
        return getattr(self, self.base_model_prefix)

    def get_input_embeddings(self) -> Any:
        return self.trunk.get_submodule(self.embeddings)

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.trunk.set_submodule(self.embeddings, value)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SequenceClassifierOutput:
        """Compute the score at the last token of each row that is not the pad token. [N, L] -> logits [N, 1]"""
        hidden = self.trunk(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (places * (input_ids != self.config.get_text_config().pad_token_id)).argmax(1)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        return SequenceClassifierOutput(logits=self.score(hidden[rows, last]))


def has_score_head(config: PreTrainedConfig) -> bool:
    """Return whether the family's classifier reads the last token, by a layer called `score`."""
    with torch.device("meta"):
        return hasattr(SequenceClassifier.from_config(config), "score")


def classifier_class(config: PreTrainedConfig) -> Any:
    """Return the class of a score head on the trunk of the config's language model. Raises ValueError."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"transformers has no language model of type {config.model_type}")
    language_model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):  # only the structure is needed, so that no memory is allocated
        model = language_model(config)
    name = trunk_name(model)
    trunk: Any = getattr(model, name)
    embeddings = next(key for key, part in trunk.named_modules() if part is model.get_input_embeddings())
    reads_text_config = type(trunk.config) is not type(config)
    return _classifier_class(language_model, name, trunk.__class__, reads_text_config, embeddings)


def trunk_name(model: PreTrainedModel) -> str:
    """Return the attribute of a language model that holds its trunk. Some families have a wrong `base_model_prefix`."""
    if hasattr(model, model.base_model_prefix):
        return model.base_model_prefix
    return next(name for name, part in model.named_children() if isinstance(part, PreTrainedModel))


@cache
def _classifier_class(language_model: Any, name: str, trunk: Any, reads_text_config: bool, embeddings: str) -> Any:
    family = next(base for base in language_model.__mro__ if PreTrainedModel in base.__bases__)
    parent = family if family is not language_model else PreTrainedModel
    title = f"{language_model.__name__.split('For')[0].removesuffix('LMHeadModel')}ForSequenceClassification"
    attributes = {
        "base_model_prefix": name,
        "trunk_class": trunk,
        "reads_text_config": reads_text_config,
        "embeddings": embeddings,
        "config_class": language_model.config_class,
        "__module__": language_model.__module__,  # transformers looks up features of the family in this module
    }
    return type(title, (TrunkClassifier, parent) if parent is not PreTrainedModel else (TrunkClassifier,), attributes)
