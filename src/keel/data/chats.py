"""Conversations as the token ids that a model reads.

A chat template writes control tokens, and the texts of the messages stand between them. A text that spells a control
token ("<|im_start|>system") stays text: it is encoded in the pieces that any other text has.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from keel.data.chat_template import Template, cached_template
from keel.data.messages import Messages
from keel.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Three code points that Unicode reserves for use inside programs: around a control token that a message spells, and
# where a text that continues ends.
OPEN, CLOSE, HERE = "\ufdd0", "\ufdd1", "\ufdd2"
MARKS = re.compile(f"[{OPEN}{CLOSE}{HERE}]")
SPELLED = re.compile(f"{OPEN}([^{OPEN}{CLOSE}{HERE}]*){CLOSE}")


@dataclass(frozen=True)
class ChatText:
    """A rendered conversation. In `marked`, control tokens that were spelled by a message stand between marks."""

    marked: str

    @property
    def text(self) -> str:
        """The conversation as a person reads it."""
        return MARKS.sub("", self.marked)

    def tokens(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """Return the ids; what a message spelled is no control token."""
        ids: list[int] = []
        for number, part in enumerate(SPELLED.split(self.marked)):
            options: dict[str, Any] = {"split_special_tokens": True} if number % 2 else {}
            part = MARKS.sub("", part)  # a template may have cut a text between two marks
            if part:
                ids += tokenizer.encode(part, add_special_tokens=False, **options)
        return ids


def render_chat(
    messages: Messages,
    tokenizer: "PreTrainedTokenizerBase",
    add_generation_prompt: bool = False,
    *,
    tools: Sequence[Any] | None = None,
    ended: bool = True,
) -> ChatText:
    """Render a conversation with the tokenizer's chat template.

    Args:
        add_generation_prompt: end with the header of the assistant's turn.
        tools: functions that the model may call.
        ended: False leaves the last message open: nothing follows its text.

    Raises DataError when the tokenizer has no chat template, or one that refuses the messages.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "the data holds chat messages, but the tokenizer has no chat template",
            where=tokenizer.name_or_path,
            fix="set chat_template (dialogue fits every model), use a chat model, or give prompts as text",
        )
    template = cached_template(tokenizer, str(tokenizer.chat_template))
    if not ended and not messages[-1]["content"]:
        return render_chat(messages[:-1], tokenizer, True, tools=tools)
    given = None if tools is None else _marked(tools, _pattern(tokenizer, "tool"))

    def write(messages: Messages) -> str:
        guarded = [_guarded(message, tokenizer) for message in messages]
        if not ended:
            guarded[-1] = guarded[-1] | {"content": guarded[-1]["content"] + HERE}
        return template.render(guarded, add_generation_prompt, given)

    text = _with_arguments(messages, write)
    if not ended and HERE not in text:
        what = "the chat template leaves out the end of the last message, which is to be continued"
        raise DataError(what, where=tokenizer.name_or_path, fix="use another template (chat_template)")
    return ChatText(text if ended else text[: text.rindex(HERE)])


def spelled_tokens(messages: Messages, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return the control tokens that the messages spell, in their order."""
    return [
        token
        for message in messages
        for text in _texts(message)
        for token in _pattern(tokenizer, message["role"]).findall(text)
    ]


def unwritten(messages: Messages, tokenizer: "PreTrainedTokenizerBase", tools: Sequence[Any] | None) -> Iterator[str]:
    """What the chat template writes nothing of: the tool calls of a message, or the tools themselves."""
    calling = [i for i, message in enumerate(messages) if message.get("tool_calls")]
    if not calling and not tools:
        return
    text = render_chat(messages, tokenizer, tools=tools).text
    for i in calling:
        without = {key: value for key, value in messages[i].items() if key != "tool_calls"}
        if _same_text([*messages[:i], without, *messages[i + 1 :]], tokenizer, tools, text):
            yield f"the tool calls of message {i + 1}"
    if tools and _same_text(messages, tokenizer, None, text):
        yield 'the column "tools"'


def _same_text(
    messages: Messages, tokenizer: "PreTrainedTokenizerBase", tools: Sequence[Any] | None, text: str
) -> bool:
    try:
        return render_chat(messages, tokenizer, tools=tools).text == text
    except DataError:  # it does read what is missing here
        return False


def hidden_ids(tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Return the special tokens that are no text of a response: all but those that the chat template leaves to the
    assistant, such as those around thoughts."""
    return _hidden_ids(tokenizer, str(tokenizer.chat_template), len(tokenizer))


def turn_end_id(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Return the special token that the chat template writes behind an answer first; None without one."""
    template = cached_template(tokenizer, str(tokenizer.chat_template))
    text = template.render([{"role": "user", "content": "x"}, {"role": "assistant", "content": HERE}], False)
    behind = tokenizer.encode(text.rpartition(HERE)[2], add_special_tokens=False)
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((token for token in behind if token in special), None)


def read_tools(columns: Mapping[str, Any]) -> list[Any] | None:
    """Return the column `tools` of a row: a list of JSON schemas, or that as text. Raises ValueError."""
    tools = columns.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise ValueError(f'"tools" is no JSON: {error}') from None
    if tools is not None and not isinstance(tools, list):
        raise ValueError('"tools" is no list')
    return tools or None


def _with_arguments(messages: Messages, write: Callable[[Messages], str]) -> str:
    """Write messages with the arguments of their tool calls in the form that the template reads.

    Files have them as an object or as JSON text (OpenAI), and so do templates, whatever the file has: most write an
    object as JSON, so that a text would be quoted twice; some only join texts. The object is taken unless the template
    refuses it, or writes it as Python does.
    """
    objects, texts = (_arguments_as(messages, kind) for kind in (dict, str))
    if objects == texts:
        return write(messages)
    try:
        text = write(objects)
    except DataError as error:
        try:
            return write(texts)
        except DataError:
            raise error from None
    shown = (str(function["arguments"]) for function in _functions(objects) if function.get("arguments"))
    return write(texts) if any(python in text for python in shown) else text


def _functions(messages: Messages) -> Iterator[dict[str, Any]]:
    """The called functions of all messages: each call, or what it holds under `function`."""
    for message in messages:
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else []:
            if isinstance(call, dict):
                yield call["function"] if isinstance(call.get("function"), dict) else call


def _arguments_as(messages: Messages, kind: type) -> Messages:
    """A copy of the messages whose arguments of tool calls are objects or JSON texts; what is neither stays."""
    copies = copy.deepcopy(messages)
    for function in _functions(copies):
        arguments = function.get("arguments")
        if isinstance(arguments, str) and kind is dict:
            try:
                arguments = json.loads(arguments)
            except ValueError:
                continue
        elif isinstance(arguments, dict) and kind is str:
            arguments = json.dumps(arguments, ensure_ascii=False)
        if isinstance(arguments, kind):
            function["arguments"] = arguments
    return copies


def _guarded(message: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """The message with marks around every control token that its texts spell."""
    pattern = _pattern(tokenizer, message["role"])
    return {key: value if key == "role" else _marked(value, pattern) for key, value in message.items()}


def _marked(value: Any, pattern: re.Pattern[str]) -> Any:
    """A text, or what holds texts, with marks around what the pattern finds. Raises DataError for a mark in it."""
    if isinstance(value, str):
        if MARKS.search(value):
            raise DataError("a message holds one of U+FDD0 to U+FDD2, which are no characters", fix="leave them out")
        return pattern.sub(lambda found: f"{OPEN}{found[0]}{CLOSE}", value)
    if isinstance(value, dict):
        return {_marked(key, pattern): _marked(entry, pattern) for key, entry in value.items()}
    return [_marked(entry, pattern) for entry in value] if isinstance(value, list) else value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, entry in value.items():
            if key != "role":
                yield from _texts(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry)


@cache
def _hidden_ids(tokenizer: "PreTrainedTokenizerBase", template: str, num_tokens: int) -> frozenset[int]:
    special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    if not tokenizer.chat_template:
        return frozenset(special)
    control = _control_tokens(tokenizer, template, num_tokens, True)
    return frozenset(
        number for number, text in special.items() if control.fullmatch(text) or text == tokenizer.unk_token
    )


def _pattern(tokenizer: "PreTrainedTokenizerBase", role: str) -> re.Pattern[str]:
    return _control_tokens(tokenizer, str(tokenizer.chat_template), len(tokenizer), role == "assistant")


@cache
def _control_tokens(
    tokenizer: "PreTrainedTokenizerBase", template: str, num_tokens: int, by_assistant: bool
) -> re.Pattern[str]:
    """What a message must not spell.

    The assistant's own tokens, such as those around its thoughts and calls, are its to write; but not those that end
    or begin a turn.
    """
    control = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    if by_assistant:
        try:
            # of its own, so that the first real conversation is still the one that is tried
            turn = Template(tokenizer).render([{"role": "user", "content": "x"}], False)
        except DataError:
            turn = " ".join(control)
        named = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
        control = {token for token in control if token in turn or token in named}
    longest_first = sorted(control, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
