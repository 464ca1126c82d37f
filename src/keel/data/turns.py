"""What is learned of an answer: its tokens up to the one that ends it, after all that a sampler would have read."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from keel.data.chats import ChatText, render_chat, unwritten
from keel.data.messages import (
    Content,
    Messages,
    ends_with_assistant,
    learned_turns,
    with_response,
    without_oldest_turn,
)
from keel.data.preferences import Ranking
from keel.data.prompts import encode_text, split_start
from keel.errors import DataError

SHOWN = 40
"""Characters of a text that an error shows."""


@dataclass(frozen=True)
class Example:
    """A text as ids, and which of them are to be imitated."""

    prompt: Content  # rows with equal prompts stay on one side of a split; the text itself where there is no prompt
    tokens: tuple[int, ...]
    num_prompt_tokens: int  # these are read and not learned
    others: tuple[tuple[int, int], ...] = ()  # nor are these later ranges: what is said between the answers

    @property
    def learned(self) -> list[bool]:
        """For each token whether it is predicted from something and learned."""
        marks = [i >= max(1, self.num_prompt_tokens) for i in range(len(self.tokens))]
        for start, end in self.others:
            marks[start:end] = [False] * len(marks[start:end])
        return marks

    @property
    def num_targets(self) -> int:
        return sum(self.learned)


def encode_response(
    content: Content,
    response: Content,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: Sequence[int],
    tools: Sequence[Any] | None = None,
) -> Example:
    """Ids of a prompt, of the answer to it (text, or one message) and of the token that ends it. Raises DataError."""
    if isinstance(content, str):
        text = response if isinstance(response, str) else response[0]["content"]
        before, completion = encode_text(content, tokenizer), _text_ids(content, content + text, tokenizer)
        if not completion or completion[-1] not in end_ids:
            completion = [*completion, end_token(tokenizer, end_ids)]
    else:
        before, completion = _chat_ids(content, response, tokenizer, tools)
        # A sampler stops at the first; a template may write a line break and more behind it.
        ends = [i for i, token in enumerate(completion) if token in end_ids]
        completion = completion[: ends[0] + 1] if ends else [*completion, end_token(tokenizer, end_ids)]
    return Example(content, (*before, *completion), len(before))


def encode_turns(
    prompt: Messages,
    completion: Messages,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: Sequence[int],
    turns: str = "all",
    tools: Sequence[Any] | None = None,
) -> list[Example]:
    """What the assistant says in the messages after a prompt (which may be empty): all its turns, or the last.

    One example holds them all where each turn is read as a sampler would have read it at its time. Else each has an
    example of its own: templates that leave earlier thoughts out write another text later on.
    """
    conversation = with_response(prompt, completion) if prompt else completion
    first = len(conversation) - len(completion)
    examples = []
    for i in learned_turns(prompt, completion)[-1 if turns == "last" else 0 :]:
        calls = f"the tool calls of message {first + i + 1}"
        if calls in unwritten(conversation[: first + i + 1], tokenizer, tools):
            raise DataError(
                f"the chat template writes nothing of {calls}, so they cannot be learned",
                fix="use a template that writes them (chat_template)",
            )
        before = prompt if prompt and i == 0 else conversation[: first + i]
        examples.append(encode_response(before, [completion[i]], tokenizer, end_ids, tools))
    whole = examples[-1]
    if any(whole.tokens[: len(part.tokens)] != part.tokens for part in examples[:-1]):
        key = examples[0].prompt
        return [Example(key, part.tokens, part.num_prompt_tokens) for part in examples]
    between = tuple((len(one.tokens), other.num_prompt_tokens) for one, other in pairwise(examples))
    return [Example(examples[0].prompt, whole.tokens, examples[0].num_prompt_tokens, between)]


def encode_ranking(
    ranking: Ranking, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int], limit: int
) -> tuple[list[Example] | None, bool]:
    """The answers of a ranking after as much of the prompt as fits, None where nothing does; whether it was cut."""
    prompt: Content | None = ranking.prompt
    was_cut = False
    while prompt is not None:
        responses = [encode_response(prompt, text, tokenizer, end_ids, ranking.tools) for text in ranking.responses]
        if max(len(response.tokens) for response in responses) <= limit:
            return responses, was_cut
        was_cut = True
        if isinstance(prompt, str):
            longest = max(len(response.tokens) - response.num_prompt_tokens for response in responses)
            fitting = (
                [keep_end(response, limit - longest, tokenizer) for response in responses] if longest < limit else None
            )
            return fitting, True
        prompt = without_oldest_turn(prompt)
    return None, True


def keep_end(example: Example, num_prompt_tokens: int, tokenizer: PreTrainedTokenizerBase) -> Example:
    """The same with at most so many tokens of a text prompt: it loses its beginning but for what starts every text."""
    assert isinstance(example.prompt, str)
    if example.num_prompt_tokens <= num_prompt_tokens:
        return example
    first = min(num_prompt_tokens, len(split_start(example.prompt, tokenizer)[0]))
    rest = example.tokens[example.num_prompt_tokens - (num_prompt_tokens - first) :]
    return Example(example.prompt, example.tokens[:first] + rest, num_prompt_tokens)


def end_token(tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> int:
    """The tokenizer's end token where it ends answers, else the first of the model's."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id in end_ids else end_ids[0]


def common_prefix_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Number of characters or ids with which both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _chat_ids(
    content: Messages, response: Content, tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any] | None
) -> tuple[list[int], list[int]]:
    """Ids that are read, and those that follow them.

    Some templates open the answer otherwise when it is sampled than when it is there ("<think>" and a line break, and
    "<think></think>"). It is then learned from where the two part.
    """
    goes_on = ends_with_assistant(content)
    before = render_chat(content, tokenizer, not goes_on, tools=tools, ended=not goes_on)
    whole = render_chat(with_response(content, response), tokenizer, tools=tools)
    read, together = before.tokens(tokenizer), whole.tokens(tokenizer)
    if whole.marked.startswith(before.marked):
        if together[: len(read)] == read:
            return read, together[len(read) :]
        return read, ChatText(whole.marked[len(before.marked) :]).tokens(tokenizer)
    shared = common_prefix_length(before.marked, whole.marked)
    asked = before if goes_on else render_chat(content, tokenizer, tools=tools)
    if shared < common_prefix_length(before.marked, asked.marked):
        start = max(0, shared - SHOWN // 2)
        sampled, learned = (text.marked[start : shared + SHOWN] for text in (before, whole))
        raise DataError(
            f"the chat template writes the prompt otherwise when an answer follows: {sampled!r}, but {learned!r}",
            where=tokenizer.name_or_path,
            fix="use a template in which the prompt stays as it is (chat_template)",
        )
    parted = common_prefix_length(read, together)
    return together[:parted], together[parted:]


def _text_ids(prompt: str, whole: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that follow the prompt's ids: as the tokenizer splits the whole text, where that leaves the prompt's ids as
    they are (tokenised alone, many tokenizers would put a space in front), else of the completion alone."""
    before, together = (tokenizer.encode(text, add_special_tokens=False) for text in (prompt, whole))
    if together[: len(before)] == before:
        return together[len(before) :]
    return tokenizer.encode(whole[len(prompt) :], add_special_tokens=False)
