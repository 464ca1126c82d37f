"""What is sampled and learned with the chat formats of public model families; docs/chats.md has the table."""

import json
from pathlib import Path
from typing import Any

import pytest

from keel.data.chats import render_chat, turn_end_id
from keel.data.named_templates import set_chat_template
from keel.data.prompts import encode_prompt
from keel.data.turns import Example, encode_response, encode_turns
from keel.errors import DataError

from ..chat_tokenizer import assistant, system, user
from .chat_families import FAMILIES, R1_EOS, REFUSED, SEPARATE, Family, family_tokenizer

DOCS = Path(__file__).parents[2] / "docs"
CHAT = [user("Hi"), assistant("Yes."), user("Why?"), assistant("No.")]
families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
TOOL_CHAT = [user("Hi"), {**assistant(""), "tool_calls": CALL}, {"role": "tool", "content": "42"}, assistant("Yes.")]


def tokenizer_with_variables(family: Family) -> Any:
    tokenizer = family_tokenizer(family)
    if family.variables and "set enable_thinking" not in tokenizer.chat_template:
        set_chat_template(tokenizer, None, dict(family.variables))
    return tokenizer


def end_ids(family: Family) -> list[int]:
    tokenizer = tokenizer_with_variables(family)
    ids = [turn_end_id(tokenizer), *map(tokenizer.convert_tokens_to_ids, family.other_ends)]
    return list(dict.fromkeys(ids))


def texts(family: Family, example: Example) -> list[tuple[bool, str]]:
    """The example as (learned, text) pieces."""
    pieces: list[tuple[bool, list[int]]] = []
    for token, learned in zip(example.tokens, example.learned, strict=True):
        if not pieces or pieces[-1][0] != learned:
            pieces.append((learned, []))
        pieces[-1][1].append(token)
    return [(learned, tokenizer_with_variables(family).decode(ids)) for learned, ids in pieces]


@families
def test_a_response_is_learned_after_what_a_sampler_reads(family: Family) -> None:
    tokenizer, ends = tokenizer_with_variables(family), end_ids(family)
    example = encode_response(CHAT[:1], CHAT[1]["content"], tokenizer, ends)
    assert texts(family, example) == [(False, family.reads), (True, family.learns)]
    assert example.tokens[-1] == turn_end_id(tokenizer)
    sampled = encode_prompt(CHAT[:1], tokenizer, {})
    if family.name == "DeepSeek-R1":
        assert tokenizer.decode(sampled.tokens) == family.reads + "<think>\n"
    else:
        assert sampled.tokens == example.tokens[: example.num_prompt_tokens]


@families
def test_all_turns_or_the_last_one_are_learned(family: Family) -> None:
    tokenizer, ends = tokenizer_with_variables(family), end_ids(family)
    second = family.learns.replace("Yes.", "No.")
    all_turns = [texts(family, example) for example in encode_turns([], CHAT, tokenizer, ends)]
    first = [(False, family.reads), (True, family.learns)]
    if family.between == SEPARATE:
        assert len(all_turns) == 2
        assert all_turns[0] == first
        assert all_turns[1][-1] == (True, second)
        assert "<think>" not in all_turns[1][0][1].removesuffix("<think>\n\n</think>\n\n")
    else:
        assert all_turns == [[*first, (False, family.between), (True, second)]]
    (last,) = [texts(family, example) for example in encode_turns([], CHAT, tokenizer, ends, "last")]
    assert [text for learned, text in last if learned] == [second]


@families
def test_the_system_message(family: Family) -> None:
    tokenizer, chat = tokenizer_with_variables(family), [system("Be kind."), user("Hi")]
    if family.system == REFUSED:
        with pytest.raises(DataError, match="System role not supported"):
            render_chat(chat, tokenizer, True)
    else:
        assert render_chat(chat, tokenizer, True).text.startswith(family.system)


def test_a_system_message_in_the_last_question_makes_turns_separate_examples() -> None:
    mistral = next(family for family in FAMILIES if family.name == "Mistral v0.3")
    examples = encode_turns([], [system("Be kind."), *CHAT], tokenizer_with_variables(mistral), end_ids(mistral))
    assert [texts(mistral, example) for example in examples] == [
        [(False, "<s>[INST] Be kind.\n\nHi[/INST]"), (True, " Yes.</s>")],
        [(False, "<s>[INST] Hi[/INST] Yes.</s>[INST] Be kind.\n\nWhy?[/INST]"), (True, " No.</s>")],
    ]


def test_thoughts_are_learned_where_the_template_writes_them() -> None:
    """Qwen3 writes those after the last question; DeepSeek-R1 writes none, which is reported when a file is read."""
    by_name = {family.name: family for family in FAMILIES}
    thinking = "<think>\nSure?\n</think>\n\nYes."
    qwen, r1 = by_name["Qwen3"], by_name["DeepSeek-R1"]
    example = encode_response(CHAT[:1], thinking, tokenizer_with_variables(qwen), end_ids(qwen))
    assert texts(qwen, example)[-1] == (True, thinking + "<|im_end|>")
    example = encode_response(CHAT[:1], thinking, tokenizer_with_variables(r1), end_ids(r1))
    assert texts(r1, example)[-1] == (True, f"\n\nYes.{R1_EOS}")


TOOL_TEXTS = {
    "Qwen2.5": "<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n",
    "SmolLM2": "<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n",
    "Qwen3": "<|im_start|>tool\n42<|im_end|>\n",
    "Llama 3": "<|start_header_id|>ipython<|end_header_id|>\n\n42<|eot_id|>",
    "Phi-3": "<|tool|>\n42<|end|>\n",
    "Zephyr": "<|tool|>\n42</s>\n",
    "OLMo 2": "<|tool|>\n42\n",
    "Granite 3": "<|start_of_role|>tool_response<|end_of_role|>42<|end_of_text|>\n",
}


@pytest.mark.parametrize("name", TOOL_TEXTS)
def test_the_turn_of_a_tool_is_read_as_text(name: str) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    (example,) = encode_turns([], TOOL_CHAT, tokenizer_with_variables(family), end_ids(family), "last")
    read, learned = texts(family, example)
    assert TOOL_TEXTS[name] in read[1]
    assert learned == (True, family.learns)


@pytest.mark.parametrize("name", ["Llama 2", "Mistral v0.3", "Gemma 2", "Command R"])
def test_a_template_without_tools_refuses_them(name: str) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    with pytest.raises(DataError, match="the chat template refuses these messages"):
        encode_turns([], TOOL_CHAT, tokenizer_with_variables(family), end_ids(family), "last")


@pytest.mark.parametrize("name", ["Qwen2.5", "SmolLM2"])
def test_a_call_is_learned_as_the_template_writes_it(name: str) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    examples = encode_turns([], TOOL_CHAT, tokenizer_with_variables(family), end_ids(family))
    learned = [text for example in examples for is_learned, text in texts(family, example) if is_learned]
    assert learned[0] == f"<tool_call>\n{json.dumps(CALL[0]['function'])}\n</tool_call><|im_end|>"
    assert learned[1] == "Yes.<|im_end|>"


@families
def test_no_message_can_end_or_begin_a_turn(family: Family) -> None:
    forged = "".join(family.tokens)
    plain = encode_prompt(CHAT[:1], tokenizer_with_variables(family), {}).tokens
    tokens = encode_prompt([user("Hi" + forged)], tokenizer_with_variables(family), {}).tokens
    ids = {tokenizer_with_variables(family).convert_tokens_to_ids(token) for token in family.tokens}
    special = ids - {tokenizer_with_variables(family).convert_tokens_to_ids(each) for each in ("<think>", "</think>")}
    assert sum(token in special for token in tokens) == sum(token in special for token in plain)


def shown(text: str) -> str:
    escaped = text.replace("\n", "\\n").replace("|", "\\|")
    return f"`{escaped}`"


def test_the_documents_show_the_table() -> None:
    rows = ["| family | a sampler reads | learned of `Yes.` | further end tokens | remarks |", "|---|---|---|---|---|"]
    for family in FAMILIES:
        ends = ", ".join(map(shown, family.other_ends))
        rows.append(f"| {family.name} | {shown(family.reads)} | {shown(family.learns)} | {ends} | {family.notes} |")
    assert "\n".join(rows) in (DOCS / "chats.md").read_text(), "\n".join(rows)
