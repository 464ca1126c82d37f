"""Messages in the formats of data files, and the errors for invalid ones."""

from typing import Any

import pytest

from keel.data.messages import as_chat, as_messages, with_response, without_oldest_turn

from ..chat_tokenizer import assistant, system, user

CALL = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"from": "human", "value": "hi"}, user("hi")),
        ({"from": "gpt", "value": "hi"}, assistant("hi")),
        ({"from": "system", "value": "be brief"}, system("be brief")),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, user("ab")),
        ({"role": "user", "content": ["a", "b"]}, user("ab")),
        (
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
        ),
        ({"role": "user", "content": "hi", "tool_calls": None, "name": None}, user("hi")),
        ({"role": "user", "content": "hi", "name": "anna"}, user("hi") | {"name": "anna"}),
    ],
)
def test_every_form_becomes_one(given: dict[str, Any], read: dict[str, Any]):
    assert as_messages([given]) == [read]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("hi", "message 2 is not"),
        ({"content": "hi"}, 'message 2 has no "role"'),
        ({"role": "asistant", "content": "hi"}, "message 2 has the role 'asistant'; did you mean 'assistant'"),
        ({"role": "model", "content": "hi"}, "did you mean 'assistant'"),
        ({"role": "narrator", "content": "hi"}, "known: system"),
        ({"from": "alien", "value": "hi"}, "message 2 has the role 'alien'"),
        ({"role": "user"}, r'message 2 \(user\) has no "content"'),
        ({"role": "assistant", "content": None}, r'message 2 \(assistant\) has no "content"'),
        ({"role": "user", "content": 3}, r'"content" of message 2 \(user\) is not text'),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "part of type 'image_url'"),
        ({"role": "user", "content": [{"type": "image"}]}, "part of type 'image'"),
    ],
)
def test_an_invalid_message_is_reported_with_its_number(bad: Any, reason: str):
    with pytest.raises(ValueError, match=reason):
        as_messages([user("first"), bad])


def test_a_response_continues_the_assistants_last_message():
    assert with_response([user("a")], "b") == [user("a"), assistant("b")]
    assert with_response([user("a"), assistant("b")], "c") == [user("a"), assistant("bc")]
    assert with_response([user("a"), assistant("b")], [assistant("c"), user("d")]) == [
        user("a"), assistant("bc"), user("d")
    ]  # fmt: skip


def test_a_text_becomes_a_users_message_behind_the_system_message():
    assert as_chat("a") == [user("a")]
    assert as_chat("a", "s") == [system("s"), user("a")]
    assert as_chat([system("own"), user("a")], "s") == [system("own"), user("a")]


def test_the_oldest_turn_is_dropped_and_the_instructions_stay():
    chat = [system("s"), user("a"), assistant("b"), {"role": "tool", "content": "t"}, user("c"), assistant("d")]
    assert without_oldest_turn(chat) == [system("s"), user("c"), assistant("d")]
    assert without_oldest_turn([system("s"), user("c"), assistant("d")]) is None
    assert without_oldest_turn([assistant("hello"), user("a")]) == [user("a")]
