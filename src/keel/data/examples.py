"""Texts to imitate: conversations, rows of `prompt` and `completion`, or plain `text`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from keel.data.chats import read_tools, unwritten
from keel.data.messages import Messages, learned_turns, without_oldest_turn
from keel.data.notes import LOST, UNWRITTEN, Notes, is_lost, note_kinds, remarks
from keel.data.prompts import AS_IT_IS, PromptFormat, encode_text
from keel.data.rows import (
    Row,
    naming,
    read_rows,
    refuse_undesirable,
    reject,
    require_content,
    require_messages,
    row_kind,
)
from keel.data.turns import Example, encode_response, encode_turns, end_token, keep_end
from keel.errors import DataError


@dataclass(frozen=True)
class Imitation:
    """How rows become examples."""

    tokenizer: PreTrainedTokenizerBase
    end_ids: Sequence[int]  # tokens that end an answer
    max_tokens: int = 512
    turns: str = "all"  # which turns of the assistant are learned: all, or the last
    prompt_format: PromptFormat = AS_IT_IS


def load_examples(
    path: str, imitation: Imitation, split: str = "train", notes: Notes | None = None
) -> tuple[list[Example], int]:
    """The examples of a file, none longer than `max_tokens`, and how many rows were cut for that.

    Raises DataError for a bad row, or when no example has anything to learn.
    """
    notes = notes if notes is not None else Notes()
    examples: list[Example] = []
    num_cut = 0
    rows = read_rows(path, split)
    for row in rows:
        found, was_cut = read_examples(row, path, imitation, notes)
        examples += found
        num_cut += was_cut
    note_kinds(path, {row.number: row.values.get("prompt", row.values.get("text", ())) for row in rows}, notes)
    if not any(example.num_targets > 0 for example in examples):
        limit = imitation.max_tokens
        raise DataError(f"no row has anything to learn within {limit} tokens", where=path, fix="raise max_tokens")
    return examples, num_cut


def read_examples(row: Row, path: str, imitation: Imitation, notes: Notes) -> tuple[list[Example], bool]:
    """What a row teaches, and whether it was cut. Raises DataError naming file and line.

    A prompt that is too long loses its beginning, a conversation its oldest turns, and what is still too long its end.
    """
    limit = imitation.max_tokens
    refuse_undesirable(row, path)
    if row.values.get("weight") not in (None, 1):
        notes.add(path, row.number, 'the column "weight" is not read: every row counts the same')
    with naming(row, path):
        kind = row_kind(row)
        if kind == "text":
            examples, dropped = [_text_example(row, path, imitation)], False
        elif kind == "completion":
            examples, dropped = _completion_examples(row, path, imitation, notes)
        else:
            examples, dropped = _chat_examples(row, path, [], kind, imitation, notes)
    was_cut = dropped or any(len(example.tokens) > limit for example in examples)
    if was_cut:
        notes.add(path, row.number, f"more than {limit} tokens (max_tokens); cut")
    return [replace(example, tokens=example.tokens[:limit]) for example in examples], was_cut


def _text_example(row: Row, path: str, imitation: Imitation) -> Example:
    text = str(require_content(row, path, "text"))
    tokens = encode_text(text, imitation.tokenizer)
    if tokens[-1] not in imitation.end_ids:  # a text that was rendered elsewhere has one
        tokens.append(end_token(imitation.tokenizer, imitation.end_ids))
    return Example(text, tuple(tokens), 0)


def _completion_examples(row: Row, path: str, imitation: Imitation, notes: Notes) -> tuple[list[Example], bool]:
    tokenizer, end_ids, limit = imitation.tokenizer, imitation.end_ids, imitation.max_tokens
    prompt = imitation.prompt_format.convert(require_content(row, path, "prompt"), row, path, tokenizer, notes)
    response = require_content(row, path, "completion", may_be_empty=True)
    if not isinstance(prompt, str):
        messages: Messages = [{"role": "assistant", "content": response}] if isinstance(response, str) else response
        return _chat_examples(row, path, prompt, messages, imitation, notes)
    if not isinstance(response, str) and (len(response) != 1 or response[0]["role"] != "assistant"):
        reject(row, path, "a text prompt is followed by a text or by one assistant message")
    example = encode_response(prompt, response, tokenizer, end_ids)
    length = len(example.tokens) - example.num_prompt_tokens
    fitting = (
        keep_end(example, max(1, limit - length, limit // 2), tokenizer) if len(example.tokens) > limit else example
    )
    return [fitting], fitting is not example


def _chat_examples(
    row: Row, path: str, prompt: Messages, completion: Messages | str, imitation: Imitation, notes: Notes
) -> tuple[list[Example], bool]:
    """What the assistant says in a completion (messages, or the column that holds them) after a prompt."""
    tokenizer = imitation.tokenizer
    if isinstance(completion, str):
        system = row.values.get("system")  # of ShareGPT's rows
        prompt_format = (
            replace(imitation.prompt_format, system=system)
            if isinstance(system, str) and system
            else imitation.prompt_format
        )
        read = prompt_format.convert(require_messages(row, path, completion), row, path, tokenizer, notes)
        assert not isinstance(read, str)
        completion = read
        if any(message["role"] == "assistant" for message in read) and read[-1]["role"] != "assistant":
            notes.add(path, row.number, "nothing is learned of what follows the last message of the assistant")
    else:
        for remark in remarks(completion, tokenizer, len(prompt) + 1):
            notes.add(path, row.number, remark)
    completion = completion[: learned_turns(prompt, completion)[-1] + 1]
    try:
        tools = read_tools(row.values)
    except ValueError as error:
        reject(row, path, str(error))
    for what in unwritten([*prompt, *completion], tokenizer, tools):
        notes.add(path, row.number, UNWRITTEN + what)
    if is_lost([*prompt, *completion], tokenizer, tools):
        notes.add(path, row.number, LOST)
    examples = encode_turns(prompt, completion, tokenizer, imitation.end_ids, imitation.turns, tools)
    dropped = False
    key = examples[0].prompt
    while max(len(example.tokens) for example in examples) > imitation.max_tokens:
        shorter = without_oldest_turn(prompt or completion)
        if shorter is None:
            break
        prompt, completion = (shorter, completion) if prompt else ([], shorter)
        examples, dropped = encode_turns(prompt, completion, tokenizer, imitation.end_ids, imitation.turns, tools), True
    return [replace(example, prompt=key) for example in examples], dropped
