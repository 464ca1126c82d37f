"""Read examples to imitate: conversations, rows of `prompt` and `completion`, or plain `text`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from keel.data.chats import read_tools, template_omissions
from keel.data.messages import Messages, learned_turns, without_oldest_turn
from keel.data.notes import LOST_RESPONSE, OMISSION, Notes, loses_response, note_mixed_kinds, remarks
from keel.data.prompts import UNCHANGED, PromptFormat, encode_text
from keel.data.rows import (
    Row,
    read_rows,
    refuse_undesirable,
    reject,
    require_content,
    require_messages,
    row_in_errors,
    row_kind,
)
from keel.data.turns import Example, cut_prompt, encode_response, encode_turns, end_token
from keel.errors import DataError


@dataclass(frozen=True)
class ExampleFormat:
    """How to turn rows into examples."""

    tokenizer: PreTrainedTokenizerBase
    end_ids: Sequence[int]  # tokens that end a response
    max_tokens: int = 512
    turns: str = "all"  # assistant turns to learn: all, or last
    prompt_format: PromptFormat = UNCHANGED


def load_examples(
    path: str, example_format: ExampleFormat, split: str = "train", notes: Notes | None = None
) -> tuple[list[Example], int]:
    """Load the examples of a file, cut to `max_tokens`. Also return the number of rows that were cut.

    Raises DataError for a bad row, or if no example has a token to learn.
    """
    notes = notes if notes is not None else Notes()
    examples: list[Example] = []
    num_cut = 0
    rows = read_rows(path, split)
    for row in rows:
        row_examples, was_cut = read_examples(row, path, example_format, notes)
        examples += row_examples
        num_cut += was_cut
    note_mixed_kinds(path, {row.number: row.values.get("prompt", row.values.get("text", ())) for row in rows}, notes)
    if not any(example.num_targets > 0 for example in examples):
        limit = example_format.max_tokens
        raise DataError(f"no row has a token to learn within {limit} tokens", where=path, fix="raise max_tokens")
    return examples, num_cut


def read_examples(row: Row, path: str, example_format: ExampleFormat, notes: Notes) -> tuple[list[Example], bool]:
    """Return the examples of a row, and whether it was cut.

    A long text prompt loses its beginning, a long conversation its oldest turns; what is still too long loses its end.
    Raises DataError with file and line.
    """
    limit = example_format.max_tokens
    refuse_undesirable(row, path)
    if row.values.get("weight") not in (None, 1):
        notes.add(path, row.number, 'the column "weight" is ignored: all rows count the same')
    with row_in_errors(row, path):
        kind = row_kind(row)
        if kind == "text":
            examples, dropped = [_text_example(row, path, example_format)], False
        elif kind == "completion":
            examples, dropped = _completion_examples(row, path, example_format, notes)
        else:
            examples, dropped = _chat_examples(row, path, [], kind, example_format, notes)
    was_cut = dropped or any(len(example.tokens) > limit for example in examples)
    if was_cut:
        notes.add(path, row.number, f"more than {limit} tokens (max_tokens); cut")
    return [replace(example, tokens=example.tokens[:limit]) for example in examples], was_cut


def _text_example(row: Row, path: str, example_format: ExampleFormat) -> Example:
    text = str(require_content(row, path, "text"))
    tokens = encode_text(text, example_format.tokenizer)
    if tokens[-1] not in example_format.end_ids:  # a text that another tool rendered may end with one
        tokens.append(end_token(example_format.tokenizer, example_format.end_ids))
    return Example(text, tuple(tokens), 0)


def _completion_examples(
    row: Row, path: str, example_format: ExampleFormat, notes: Notes
) -> tuple[list[Example], bool]:
    tokenizer, end_ids, limit = example_format.tokenizer, example_format.end_ids, example_format.max_tokens
    prompt = example_format.prompt_format.convert(require_content(row, path, "prompt"), row, path, tokenizer, notes)
    response = require_content(row, path, "completion", may_be_empty=True)
    if not isinstance(prompt, str):
        messages: Messages = [{"role": "assistant", "content": response}] if isinstance(response, str) else response
        return _chat_examples(row, path, prompt, messages, example_format, notes)
    if not isinstance(response, str) and (len(response) != 1 or response[0]["role"] != "assistant"):
        reject(row, path, "after a text prompt, give the completion as text or as one assistant message")
    example = encode_response(prompt, response, tokenizer, end_ids)
    length = len(example.tokens) - example.num_prompt_tokens
    # The prompt keeps at least half of the limit; a completion longer than the rest loses its end.
    fitting = (
        cut_prompt(example, max(1, limit - length, limit // 2), tokenizer) if len(example.tokens) > limit else example
    )
    return [fitting], fitting is not example


def _chat_examples(
    row: Row, path: str, prompt: Messages, completion: Messages | str, example_format: ExampleFormat, notes: Notes
) -> tuple[list[Example], bool]:
    """Encode the assistant turns of a completion: messages, or the name of the column that holds a conversation."""
    tokenizer = example_format.tokenizer
    if isinstance(completion, str):
        system = row.values.get("system")  # ShareGPT has the system message in a separate column
        prompt_format = (
            replace(example_format.prompt_format, system=system)
            if isinstance(system, str) and system
            else example_format.prompt_format
        )
        conversation = prompt_format.convert(require_messages(row, path, completion), row, path, tokenizer, notes)
        assert not isinstance(conversation, str)
        completion = conversation
        if any(message["role"] == "assistant" for message in completion) and completion[-1]["role"] != "assistant":
            notes.add(path, row.number, "the messages after the last assistant message are ignored")
    else:
        for remark in remarks(completion, tokenizer, len(prompt) + 1):
            notes.add(path, row.number, remark)
    completion = completion[: learned_turns(prompt, completion)[-1] + 1]
    try:
        tools = read_tools(row.values)
    except ValueError as error:
        reject(row, path, str(error))
    for omission in template_omissions([*prompt, *completion], tokenizer, tools):
        notes.add(path, row.number, OMISSION + omission)
    if loses_response([*prompt, *completion], tokenizer, tools):
        notes.add(path, row.number, LOST_RESPONSE)
    examples = encode_turns(prompt, completion, tokenizer, example_format.end_ids, example_format.turns, tools)
    dropped = False
    key = examples[0].prompt  # of the full conversation, so that a cut does not move the row in a split by prompt
    while max(len(example.tokens) for example in examples) > example_format.max_tokens:
        shorter = without_oldest_turn(prompt or completion)
        if shorter is None:
            break
        prompt, completion = (shorter, completion) if prompt else ([], shorter)
        examples, dropped = (
            encode_turns(prompt, completion, tokenizer, example_format.end_ids, example_format.turns, tools),
            True,
        )
    return [replace(example, prompt=key) for example in examples], dropped
