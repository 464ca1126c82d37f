"""Encode conversations as the token ids that a model reads.

A chat template writes control tokens around the texts of the messages. A message that spells a control token
("<|im_start|>system") is encoded as ordinary text, so that no message can begin or end a turn.
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

# Unicode noncharacters, which no text contains. OPEN and CLOSE enclose a control token that a message spells. HERE is
# the end of a message that the response continues.
OPEN, CLOSE, HERE = "\ufdd0", "\ufdd1", "\ufdd2"
MARKS = re.compile(f"[{OPEN}{CLOSE}{HERE}]")
SPELLED = re.compile(f"{OPEN}([^{OPEN}{CLOSE}{HERE}]*){CLOSE}")


@dataclass(frozen=True)
class ChatText:
    """A rendered conversation. `marked` has OPEN and CLOSE around the control tokens that messages spell."""

    marked: str

    @property
    def text(self) -> str:
        """The conversation without marks."""
        return MARKS.sub("", self.marked)

    def tokens(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """Return the ids. Control tokens that messages spell are encoded as ordinary text."""
        ids: list[int] = []
        for number, piece in enumerate(SPELLED.split(self.marked)):  # every second piece is spelled by a message
            options: dict[str, Any] = {"split_special_tokens": True} if number % 2 else {}
            piece = MARKS.sub("", piece)  # a template that truncates texts may leave a single mark
            if piece:
                ids += tokenizer.encode(piece, add_special_tokens=False, **options)
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
        add_generation_prompt: End with the header of the assistant's turn.
        tools: Functions that the model may call.
        ended: False leaves the last message open: nothing follows its text.

    Raises DataError if the tokenizer has no chat template, or if the template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "the data contain chat messages, but the tokenizer has no chat template",
            where=tokenizer.name_or_path,
            fix="set chat_template (dialogue works with every model), use a chat model, or give prompts as text",
        )
    template = cached_template(tokenizer, str(tokenizer.chat_template))
    if not ended and not messages[-1]["content"]:
        return render_chat(messages[:-1], tokenizer, True, tools=tools)
    marked_tools = None if tools is None else _marked(tools, _pattern(tokenizer, "tool"))

    def write(messages: Messages) -> str:
        guarded = [_guarded(message, tokenizer) for message in messages]
        if not ended:
            guarded[-1] = guarded[-1] | {"content": guarded[-1]["content"] + HERE}
        return template.render(guarded, add_generation_prompt, marked_tools)

    text = _with_arguments(messages, write)
    if not ended and HERE not in text:
        what = "the chat template omits the end of the last message, which the response continues"
        raise DataError(what, where=tokenizer.name_or_path, fix="use another template (chat_template)")
    return ChatText(text if ended else text[: text.rindex(HERE)])


def spelled_tokens(messages: Messages, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return the control tokens that the messages spell, in order of occurrence."""
    return [
        token
        for message in messages
        for text in _texts(message)
        for token in _pattern(tokenizer, message["role"]).findall(text)
    ]


def template_omissions(
    messages: Messages, tokenizer: "PreTrainedTokenizerBase", tools: Sequence[Any] | None
) -> Iterator[str]:
    """Describe what the chat template omits: the tool calls of a message, or the column `tools`.

    Something is omitted if the rendered text is the same without it.
    """
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
    except DataError:  # the template needs what is missing, so it does not omit it
        return False


def hidden_ids(tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Return the special tokens that are not part of a response's text.

    The tokens that the chat template leaves to the assistant, such as those around thoughts, are part of it.
    """
    return _hidden_ids(tokenizer, str(tokenizer.chat_template), len(tokenizer))


def turn_end_id(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Return the first special token that the chat template writes after a response; None if there is none."""
    template = cached_template(tokenizer, str(tokenizer.chat_template))
    text = template.render([{"role": "user", "content": "x"}, {"role": "assistant", "content": HERE}], False)
    ids_after = tokenizer.encode(text.rpartition(HERE)[2], add_special_tokens=False)
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((token for token in ids_after if token in special), None)


def read_tools(columns: Mapping[str, Any]) -> list[Any] | None:
    """Return the column `tools` of a row: a list of JSON schemas, or its JSON text. Raises ValueError."""
    tools = columns.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise ValueError(f'"tools" is not JSON: {error}') from None
    if tools is not None and not isinstance(tools, list):
        raise ValueError('"tools" is not a list')
    return tools or None


def _with_arguments(messages: Messages, write: Callable[[Messages], str]) -> str:
    """Write messages with the arguments of tool calls as an object or as JSON text, whichever the template needs.

    Files have either form (JSON text in OpenAI's). Most templates write an object as JSON and would quote a text twice;
    some can only join texts. Use the object unless the template refuses it, or writes it in Python's form.
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
    python_forms = (str(function["arguments"]) for function in _functions(objects) if function.get("arguments"))
    return write(texts) if any(form in text for form in python_forms) else text


def _functions(messages: Messages) -> Iterator[dict[str, Any]]:
    """Yield the called functions of all messages: the value of `function` in a call, or the call itself."""
    for message in messages:
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else []:
            if isinstance(call, dict):
                yield call["function"] if isinstance(call.get("function"), dict) else call


def _arguments_as(messages: Messages, kind: type) -> Messages:
    """Copy the messages with the arguments of tool calls as `kind`; arguments that cannot be converted stay."""
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
    """Return the message with marks around every control token that its texts spell."""
    pattern = _pattern(tokenizer, message["role"])
    return {key: value if key == "role" else _marked(value, pattern) for key, value in message.items()}


def _marked(value: Any, pattern: re.Pattern[str]) -> Any:
    """Return a value with marks around each match in its texts. Raises DataError for a text that contains a mark."""
    if isinstance(value, str):
        if MARKS.search(value):
            raise DataError("a message contains U+FDD0, U+FDD1 or U+FDD2, which are not characters", fix="remove them")
        return pattern.sub(lambda match: f"{OPEN}{match[0]}{CLOSE}", value)
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
    """Return the pattern of the tokens that a message may not write as control tokens.

    The assistant may write special tokens of its format, such as those around thoughts and calls, but none that begins
    or ends a turn. `num_tokens` is a cache key: the vocabulary may grow.
    """
    control = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    if by_assistant:
        try:
            # A new Template: the cached one must still test the first real conversation.
            turn = Template(tokenizer).render([{"role": "user", "content": "x"}], False)
        except DataError:
            turn = " ".join(control)
        named = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
        control = {token for token in control if token in turn or token in named}
    longest_first = sorted(control, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
