"""Whether a model has an embedding for every id that its tokenizer gives."""

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from keel.errors import DataError
from keel.models.heads import plain
from keel.terminal import tell
from keel.world import World

FIX = "let the model have as many: model.resize_token_embeddings(len(tokenizer)), train them, and save it"


def num_embeddings(model: Any) -> int:
    """Ids from 0 to one below this number can be read."""
    embeddings: Any = plain(model).get_input_embeddings()
    return int(embeddings.weight.shape[0])


def fill_id(model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands under the mask: the pad token, or 0 where the model has no embedding for that."""
    pad_id = int(tokenizer.pad_token_id)
    return pad_id if pad_id < num_embeddings(model) else 0


def report_unembedded_ids(model: Any, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Say that a tokenizer has ids beyond the embeddings. The pad token needs none."""
    count, pad_id = num_embeddings(model), tokenizer.pad_token_id
    beyond = [number for number in tokenizer.get_vocab().values() if number >= count and number != pad_id]
    if beyond and World.from_environment().is_main:
        tell(f"{name}: the tokenizer has ids up to {max(beyond)}, the model has {count} embeddings -> {FIX}")


def require_embeddings(
    model: Any, rows: Iterable[Sequence[int]], tokenizer: PreTrainedTokenizerBase, where: str
) -> None:
    """Raise DataError naming a token of these rows of ids that the model has no embedding for."""
    count = num_embeddings(model)
    for row in rows:
        if row and max(row) >= count:
            number = max(row)
            token = tokenizer.convert_ids_to_tokens(number)
            raise DataError(f"token {token!r} has id {number}, the model has {count} embeddings", where, FIX)
