"""Give classifiers a pad token that no text ends with.

transformers reads the score of a decoder at the last token that is not `config.pad_token_id`, and ignores the mask.
If the pad token is also an end token (GPT-2, Llama 3, SmolLM), it skips the end token of a text.
"""

import re
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from keel.models.heads import UNFIT, unwrap_model
from keel.models.model_files import token_ids

NEW = "<|pad|>"
RARE = "\U0002a6d6"
"""A character that few vocabularies have. Tokenizers without byte tokens encode it as their unknown token."""
SPARE = re.compile("pad|reserved|unused", re.IGNORECASE)


def separate_pad(model: Any, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Give a classifier and its tokenizer the same pad token, which differs from every token that may end a text.

    A suitable pad token is kept. Otherwise a reserved token of the vocabulary is used, or a new token is added.
    """
    model = unwrap_model(model)
    markers = f"{template} {tokenizer.chat_template or ''}"
    special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = {tokenizer.eos_token_id, tokenizer.bos_token_id, *_configured_ends(model.config)}
    ends.update(tokenizer.encode(RARE, add_special_tokens=False))
    ends |= {number for text, number in special.items() if text in markers}
    if tokenizer.pad_token_id in {None, *ends}:
        spare = [text for text, number in special.items() if SPARE.search(text) and number not in ends]
        spare.sort(key=lambda text: "pad" not in text.lower())
        tokenizer.add_special_tokens({"pad_token": spare[0] if spare else NEW})
    set_pad_id(model, int(tokenizer.pad_token_id))


def set_pad_id(model: Any, pad_id: int) -> None:
    """Set the pad token in the model's configs, and extend its embeddings to this token."""
    grow_embeddings(unwrap_model(model), pad_id + 1)
    unwrap_model(model).config.pad_token_id = unwrap_model(model).config.get_text_config().pad_token_id = pad_id


def grow_embeddings(model: Any, count: int) -> None:
    """Extend the embeddings to ids below `count`. New rows are zero, since only padding uses them."""
    rows = model.get_input_embeddings().weight.shape[0]
    if count > rows:
        model.resize_token_embeddings(count, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[rows:] = 0.0


def read_every_token(model: Any) -> None:
    """Let the embedding of the pad token learn where the token is text.

    torch gives the row of `padding_idx` no gradient. Padding itself needs no such rule, since no counted token depends
    on it. Some families set this row to zero whenever they are loaded (Youtu). For them it stays zero here too; the
    saved model would otherwise load differently.
    """
    embedding = model.get_input_embeddings()
    row, embedding.padding_idx = embedding.padding_idx, None
    if row is not None and _clears_pad_row(model):
        pad = torch.tensor([row])
        embedding.weight.register_hook(lambda gradient: gradient.index_fill(0, pad.to(gradient.device), 0.0))


def _clears_pad_row(model: Any) -> bool:
    """Return whether the family's initialization sets the pad token's row to zero in a weight marked as loaded."""
    with torch.random.fork_rng(devices=[]):  # random numbers drawn here would change the initial weights of an adapter
        example = nn.Embedding(2, 1, padding_idx=0)
        nn.init.ones_(example.weight)
        example.weight._is_hf_initialized = True  # type: ignore[attr-defined]
        with suppress(*UNFIT):  # some families search for the module in the model and fail
            model._init_weights(example)
    return not example.weight[0].any()


def _configured_ends(config: Any) -> list[int]:
    return token_ids(config.get_text_config().eos_token_id, "eos_token_id", config.name_or_path)
