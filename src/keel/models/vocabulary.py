"""Check that a model has an embedding for every id of its tokenizer."""

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from keel.errors import DataError
from keel.models.heads import unwrap_model
from keel.terminal import print_line
from keel.world import is_main_process

FIX = "extend the embeddings with model.resize_token_embeddings(len(tokenizer)), train them, and save the model"


def num_embeddings(model: Any) -> int:
    """Return the number of embeddings. The model can read ids below it."""
    embeddings: Any = unwrap_model(model).get_input_embeddings()
    return int(embeddings.weight.shape[0])


def fill_id(model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of masked positions: the pad token, or 0 if the model has no embedding for the pad token."""
    pad_id = int(tokenizer.pad_token_id)
    return pad_id if pad_id < num_embeddings(model) else 0


def report_unembedded_ids(model: Any, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Report that a tokenizer has ids beyond the embeddings. The pad token needs no embedding."""
    count, pad_id = num_embeddings(model), tokenizer.pad_token_id
    beyond = [number for number in tokenizer.get_vocab().values() if number >= count and number != pad_id]
    if beyond and is_main_process():
        print_line(f"{name}: the tokenizer has ids up to {max(beyond)}, but the model has {count} embeddings -> {FIX}")


def require_embeddings(
    model: Any, rows: Iterable[Sequence[int]], tokenizer: PreTrainedTokenizerBase, where: str
) -> None:
    """Raise DataError for a token in these rows of ids that the model has no embedding for."""
    count = num_embeddings(model)
    for row in rows:
        if row and max(row) >= count:
            number = max(row)
            token = tokenizer.convert_ids_to_tokens(number)
            raise DataError(f"token {token!r} has id {number}, but the model has {count} embeddings", where, FIX)
