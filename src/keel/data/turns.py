"""Encode responses for training, with the context that a sampler reads before them and the token that ends them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from keel.data.chats import ChatText, render_chat, template_omissions
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

EXCERPT_CHARACTERS = 40
"""Characters of a text to show in an error."""


@dataclass(frozen=True)
class Example:
    """Token ids, and which of them to learn."""

    prompt: Content  # key for the split by prompt; the text itself if there is no prompt
    tokens: tuple[int, ...]
    num_prompt_tokens: int  # read, not learned
    others: tuple[tuple[int, int], ...] = ()  # ranges [start, end) between responses, not learned

    @property
    def learned(self) -> list[bool]:
        """Whether each token is learned. The first token never is: nothing precedes it."""
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
    """Encode a prompt, a response to it (text, or one message) and the token that ends it. Raises DataError."""
    if isinstance(content, str):
        text = response if isinstance(response, str) else response[0]["content"]
        prompt_ids, completion = encode_text(content, tokenizer), _text_ids(content, content + text, tokenizer)
        if not completion or completion[-1] not in end_ids:
            completion = [*completion, end_token(tokenizer, end_ids)]
    else:
        prompt_ids, completion = _chat_ids(content, response, tokenizer, tools)
        # Cut at the first end token, where a sampler stops; templates may write a line break and more after it.
        ends = [i for i, token in enumerate(completion) if token in end_ids]
        completion = completion[: ends[0] + 1] if ends else [*completion, end_token(tokenizer, end_ids)]
    return Example(content, (*prompt_ids, *completion), len(prompt_ids))


def encode_turns(
    prompt: Messages,
    completion: Messages,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: Sequence[int],
    turns: str = "all",
    tools: Sequence[Any] | None = None,
) -> list[Example]:
    """Encode the assistant turns of the messages after a prompt, which may be empty.

    One example contains all turns if the conversation up to each turn has the same tokens within the full conversation.
    Otherwise each turn is one example: some templates omit the thoughts of earlier turns, which changes the text.

    Args:
        turns: Turns to learn: all, or last.
    """
    conversation = with_response(prompt, completion) if prompt else completion
    first = len(conversation) - len(completion)
    examples = []
    for i in learned_turns(prompt, completion)[-1 if turns == "last" else 0 :]:
        calls = f"the tool calls of message {first + i + 1}"
        if calls in template_omissions(conversation[: first + i + 1], tokenizer, tools):
            raise DataError(
                f"the chat template omits {calls}, so they cannot be learned",
                fix="use a template that writes them (chat_template)",
            )
        context = prompt if prompt and i == 0 else conversation[: first + i]
        examples.append(encode_response(context, [completion[i]], tokenizer, end_ids, tools))
    last, key = examples[-1], examples[0].prompt
    if any(last.tokens[: len(each.tokens)] != each.tokens for each in examples[:-1]):
        return [Example(key, each.tokens, each.num_prompt_tokens) for each in examples]
    between = tuple((len(one.tokens), following.num_prompt_tokens) for one, following in pairwise(examples))
    return [Example(key, last.tokens, examples[0].num_prompt_tokens, between)]


def encode_ranking(
    ranking: Ranking, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int], limit: int
) -> tuple[list[Example] | None, bool]:
    """Encode the responses of a ranking, each after the same prompt, cut so that all fit into `limit` tokens.

    Returns None for the examples if no part of the prompt fits, and whether the prompt was cut.
    """
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
                [cut_prompt(response, limit - longest, tokenizer) for response in responses]
                if longest < limit
                else None
            )
            return fitting, True
        prompt = without_oldest_turn(prompt)
    return None, True


def cut_prompt(example: Example, num_prompt_tokens: int, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Cut a text prompt to its last tokens, at most `num_prompt_tokens`; the tokenizer's start tokens stay."""
    assert isinstance(example.prompt, str)
    if example.num_prompt_tokens <= num_prompt_tokens:
        return example
    num_start = min(num_prompt_tokens, len(split_start(example.prompt, tokenizer)[0]))
    rest = example.tokens[example.num_prompt_tokens - (num_prompt_tokens - num_start) :]
    return Example(example.prompt, example.tokens[:num_start] + rest, num_prompt_tokens)


def end_token(tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> int:
    """Return the token that ends a response: the tokenizer's end token if `end_ids` has it, else the first of them."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id in end_ids else end_ids[0]


def common_prefix_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return the number of characters or ids with which both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _chat_ids(
    content: Messages, response: Content, tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any] | None
) -> tuple[list[int], list[int]]:
    """Return the ids that a sampler reads, and the ids of the response after them.

    Some templates begin a response differently in sampling ("<think>" and a line break) and in a conversation
    ("<think></think>"). Then the response is learned from the first token that differs.
    """
    is_continued = ends_with_assistant(content)
    prompt = render_chat(content, tokenizer, not is_continued, tools=tools, ended=not is_continued)
    full = render_chat(with_response(content, response), tokenizer, tools=tools)
    prompt_ids, full_ids = prompt.tokens(tokenizer), full.tokens(tokenizer)
    if full.marked.startswith(prompt.marked):
        if full_ids[: len(prompt_ids)] == prompt_ids:
            return prompt_ids, full_ids[len(prompt_ids) :]
        # A token spans the border. A sampler has read the ids of the prompt, so encode the response separately.
        return prompt_ids, ChatText(full.marked[len(prompt.marked) :]).tokens(tokenizer)
    shared = common_prefix_length(prompt.marked, full.marked)
    messages_only = prompt if is_continued else render_chat(content, tokenizer, tools=tools)
    if shared < common_prefix_length(prompt.marked, messages_only.marked):
        start = max(0, shared - EXCERPT_CHARACTERS // 2)
        sampled, learned = (text.marked[start : shared + EXCERPT_CHARACTERS] for text in (prompt, full))
        raise DataError(
            f"the chat template changes the prompt when a response follows: {sampled!r}, but {learned!r}",
            where=tokenizer.name_or_path,
            fix="use a template that writes the prompt the same in both cases (chat_template)",
        )
    shared_ids = common_prefix_length(prompt_ids, full_ids)
    return full_ids[:shared_ids], full_ids[shared_ids:]


def _text_ids(prompt: str, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of a text after its prompt.

    Encode the full text if that keeps the ids of the prompt, because many tokenizers put a space before a response that
    is encoded alone. Otherwise encode the response alone.
    """
    prompt_ids, full_ids = (tokenizer.encode(each, add_special_tokens=False) for each in (prompt, text))
    if full_ids[: len(prompt_ids)] == prompt_ids:
        return full_ids[len(prompt_ids) :]
    return tokenizer.encode(text[len(prompt) :], add_special_tokens=False)
