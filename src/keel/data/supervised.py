"""Texts to imitate: rows of `prompt` and `completion`, or of plain `text`."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from keel.data.prompts import encode_prompt, encode_text, render_chat
from keel.data.rows import Content, Messages, Row, read_rows, require_content
from keel.errors import DataError


@dataclass(frozen=True)
class Example:
    """A text as ids, and from where on it is to be imitated."""

    prompt: Content  # rows with equal prompts stay on one side of a split; the text itself where there is no prompt
    tokens: tuple[int, ...]
    num_prompt_tokens: int  # these are read and not learned

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted from something and learned."""
        return len(self.tokens) - max(1, self.num_prompt_tokens)


def load_examples(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: Sequence[int],
    *,
    split: str = "train",
    max_tokens: int = 512,
) -> list[Example]:
    """The examples of a file, each cut after `max_tokens` (where the prompt fills that alone, nothing is learned).

    Raises DataError for a bad row, or when no example has anything to learn.
    """
    rows = read_rows(path, split)
    examples = [_cut(encode_example(row, path, tokenizer, end_ids), max_tokens) for row in rows]
    if not any(example.num_targets > 0 for example in examples):
        raise DataError(f"no row has anything to learn within {max_tokens} tokens", where=path, fix="raise max_tokens")
    return examples


def encode_example(row: Row, path: str, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> Example:
    """Ids of prompt, completion and end token; of a plain `text`, everything is to be imitated."""
    if "text" in row.values and "prompt" not in row.values:
        text = str(require_content(row, path, "text"))
        return Example(text, (*encode_text(text, tokenizer), end_token(tokenizer, end_ids)), 0)
    content = require_content(row, path, "prompt")
    return encode_answer(content, require_content(row, path, "completion", may_be_empty=True), tokenizer, end_ids)


def encode_answer(
    content: Content, answer: Content, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]
) -> Example:
    """Ids of a prompt, of the answer to it and of the end token after that. Raises DataError."""
    prompt = encode_prompt(content, tokenizer)
    completion = _completion_ids(prompt.text, _whole_text(content, prompt.text, answer, tokenizer), tokenizer)
    ends = [i for i, token in enumerate(completion) if token in end_ids]
    if ends and (isinstance(content, list) or ends[-1] + 1 == len(completion)):
        completion = completion[: ends[-1] + 1]  # a chat template writes a line break and more behind it
    else:
        completion = [*completion, end_token(tokenizer, end_ids)]
    return Example(content, (*prompt.tokens, *completion), len(prompt.tokens))


def keep_end(example: Example, num_prompt_tokens: int, tokenizer: PreTrainedTokenizerBase) -> Example:
    """The same with at most so many tokens of the prompt, which loses its beginning but for what starts every text."""
    if example.num_prompt_tokens <= num_prompt_tokens:
        return example
    first = 0  # a chat template writes its special tokens into the text
    if isinstance(example.prompt, str):
        bare = tokenizer.encode(example.prompt, add_special_tokens=False)
        first = min(num_prompt_tokens, max(0, example.num_prompt_tokens - len(bare)))
    rest = example.tokens[example.num_prompt_tokens - (num_prompt_tokens - first) :]
    return Example(example.prompt, example.tokens[:first] + rest, num_prompt_tokens)


def end_token(tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> int:
    """The tokenizer's end token where it ends answers, else the first of the model's."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id in end_ids else end_ids[0]


def _whole_text(content: Content, prompt: str, completion: Content, tokenizer: PreTrainedTokenizerBase) -> str:
    """Prompt and completion as one text, of which the prompt's text is the beginning."""
    if isinstance(content, str):
        return prompt + (completion if isinstance(completion, str) else completion[0]["content"])
    answer: Messages = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    whole = render_chat([*content, *answer], tokenizer)
    if not whole.startswith(prompt):
        raise DataError(
            "the chat template writes a prompt otherwise when an answer follows",
            where=tokenizer.name_or_path,
            fix="use a template in which the prompt stays as it is",
        )
    return whole


def _completion_ids(prompt: str, whole: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that follow the prompt's ids: as the tokenizer splits the whole text, where that leaves the prompt's ids as
    they are (tokenised alone, many tokenizers would put a space in front), else of the completion alone."""
    before, together = (tokenizer.encode(text, add_special_tokens=False) for text in (prompt, whole))
    if together[: len(before)] == before:
        return together[len(before) :]
    return tokenizer.encode(whole[len(prompt) :], add_special_tokens=False)


def _cut(example: Example, max_tokens: int) -> Example:
    return Example(example.prompt, example.tokens[:max_tokens], example.num_prompt_tokens)
