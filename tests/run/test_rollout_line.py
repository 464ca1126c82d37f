"""What is written of a response is found again, whatever its texts hold."""

import json
from pathlib import Path
from typing import Any

import pytest

from keel.run.read.responses import ResponseLog
from keel.run.rollout_line import encode_line, find_parts
from keel.run.rollout_log import RolloutLog

HOSTILE = ["plain", 'a", "prompt": "b', ', "response": ', ', "tokens": [1]', "line\nfeed", '\u2028 \\ " é', ""]


def row(prompt: Any, response: str, number: int = 0) -> dict[str, Any]:
    short = {"row": number, "rows": 1, "score": 0.5, "kl": float("nan"), "length": 2, "truncated": False}
    return {**short, "scores": {"a": 0.5}, "prompt": prompt, "response": response, "tokens": [1, 2], "pieces": ["x"]}


@pytest.mark.parametrize("prompt", [*HOSTILE, [{"role": "user", "content": ', "prompt": "x"'}]])
@pytest.mark.parametrize("response", HOSTILE)
def test_parts_are_found(prompt: Any, response: str):
    data = b"{}\n" + encode_line(3, row(prompt, response)).encode()
    parts = find_parts(data, 3)
    assert json.loads(data[3 : parts.short_end] + b"}")["step"] == 3
    assert json.loads(data[parts.prompt : parts.prompt_end]) == prompt
    assert json.loads(b"{" + data[parts.texts : parts.texts_end] + b"}") == {"prompt": prompt, "response": response}
    assert data[parts.end :] == b"\n"


def test_what_was_logged_is_read(tmp_path: Path):
    log = RolloutLog(tmp_path / "rollouts.jsonl")
    for step, text in enumerate(HOSTILE, start=1):
        log.log(step, [row(text, text)])
    answers = ResponseLog(tmp_path / "rollouts.jsonl")
    answers.refresh()
    assert answers.step.tolist() == list(range(1, len(HOSTILE) + 1))
    assert answers.score.tolist() == [0.5] * len(HOSTILE)
    found = [(prompt, response) for _, prompt, response in answers.texts(answers.step - 1)]
    assert found == [(text, text) for text in HOSTILE]


def test_fields_are_written_in_one_order():
    fields = row("w1", "w2")
    assert encode_line(1, dict(reversed(fields.items()))).startswith(encode_line(1, fields).partition(', "pieces"')[0])
    with pytest.raises(ValueError, match="another order"):
        find_parts(b'{"step": 1, "response": "a", "prompt": "b", "tokens": []}\n', 0)
