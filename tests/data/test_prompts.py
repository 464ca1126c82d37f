"""Data files and prompts: what is read, and the errors for invalid rows."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from keel.data.prompts import PromptFormat, encode_prompt, encode_text, load_prompts
from keel.data.rows import read_rows, require
from keel.errors import DataError

CHAT = "{% for m in messages %}<s> {{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}<s>{% endif %}"


@pytest.fixture
def tokenizer(tiny_policy: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_policy)


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def adding(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    """Make the tokenizer put special tokens around a text, as many do."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def test_rows_are_numbered_as_in_the_file(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9\xe2\x80\xa8x"}\r\n\n{"a": 2}')
    rows = read_rows(str(path))
    assert [(row.number, row.values["a"]) for row in rows] == [(1, "é\u2028x"), (3, 2)]


BROKEN = [
    (b'{"a": 1}\n{"a": \n', "not JSON", 2),
    (b'{"a": 1}\n[1]\n', "expected an object, got a list", 2),
    (b'{"a": NaN}\n', "NaN is not a number", 1),
    (b'{"a": "\xff"}\n', "not UTF-8", 1),
    (b'{"a": "\\ud800"}\n', "not UTF-8", 1),
]


@pytest.mark.parametrize(("content", "reason", "line"), BROKEN)
def test_a_broken_line_is_named(tmp_path: Path, content: bytes, reason: str, line: int):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rows(str(path))
    assert caught.value.where == f"{path}:{line}"
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: str):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="has no rows"):
        read_rows(str(path))


def test_a_missing_file_is_refused(tmp_path: Path):
    for name in ("none.jsonl", "none.parquet"):
        with pytest.raises(DataError, match=r"(?i)no such file"):
            read_rows(str(tmp_path / name))


def test_parquet_gives_the_same_rows(tmp_path: Path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    columns = {"prompt": ["a", "b"], "ranks": [[1, None], [2, 1]]}
    parquet.write_table(pyarrow.table(columns), path)
    rows = read_rows(str(path))
    assert [row.values for row in rows] == [{"prompt": "a", "ranks": [1, None]}, {"prompt": "b", "ranks": [2, 1]}]


def test_a_damaged_parquet_file_is_one_line_of_error(tmp_path: Path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"junk")
    with pytest.raises(DataError, match="cannot read it"):
        read_rows(str(path))


def test_columns_are_checked_with_a_hint(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", {"promt": "a", "n": True})
    [row] = read_rows(path)
    with pytest.raises(DataError, match="no column \"prompt\"; did you mean 'promt'") as caught:
        require(row, path, "prompt")
    assert caught.value.where == f"{path}:1"
    with pytest.raises(DataError, match='no column "xyz"; columns: promt, n'):
        require(row, path, "xyz")
    with pytest.raises(DataError, match='expected text in "n", got bool'):
        require(row, path, "n")


def test_prompts_keep_their_other_columns(tmp_path: Path, tokenizer: PreTrainedTokenizerBase):
    path = write(tmp_path / "p.jsonl", {"prompt": "w0 w1", "answer": 3}, {"prompt": "w2"})
    first, second = load_prompts(path, tokenizer)
    assert (first.content, first.text, first.tokens, first.columns) == ("w0 w1", "w0 w1", (4, 5), {"answer": 3})
    assert second.tokens == (6,)
    [named] = load_prompts(
        write(tmp_path / "q.jsonl", {"question": "w0"}), tokenizer, prompt_format=PromptFormat(column="question")
    )
    assert named.tokens == (4,)


@pytest.mark.parametrize("prompt", ["", "  \n ", [], [{"role": "user"}], [1], None, 7])
def test_an_empty_prompt_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, prompt: Any):
    path = write(tmp_path / "p.jsonl", {"prompt": "w0"}, {"prompt": prompt})
    with pytest.raises(DataError) as caught:
        load_prompts(path, tokenizer)
    assert caught.value.where == f"{path}:2"


def test_a_prompt_must_have_tokens(tmp_path: Path, tokenizer: PreTrainedTokenizerBase):
    """Some tokenizers drop characters that they do not know."""
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    path = write(tmp_path / "p.jsonl", {"prompt": "w0\u200b"}, {"prompt": "\u200b"})
    with pytest.raises(DataError) as caught:
        load_prompts(path, tokenizer)
    assert caught.value.where == f"{path}:2"


def test_long_prompts_are_refused_dropped_or_cut(tmp_path: Path, tokenizer: PreTrainedTokenizerBase):
    path = write(tmp_path / "p.jsonl", {"prompt": "w0 w1 w2"}, {"prompt": "w3"}, {"prompt": "w4 w5 w6 w7"})
    with pytest.raises(DataError, match=r"2 prompts have more than 2 tokens \(lines 1, 3\)"):
        load_prompts(path, tokenizer, max_tokens=2)
    assert [prompt.text for prompt in load_prompts(path, tokenizer, max_tokens=2, too_long="drop")] == ["w3"]
    cut = load_prompts(path, tokenizer, max_tokens=2, too_long="truncate")
    assert [prompt.text for prompt in cut] == ["w1 w2", "w3", "w6 w7"]
    assert cut[0].tokens == (5, 6)
    with pytest.raises(DataError, match="all prompts have more than"):
        load_prompts(write(tmp_path / "q.jsonl", {"prompt": "w0 w1"}), tokenizer, max_tokens=1, too_long="drop")


def test_a_start_that_the_text_spells_is_not_doubled(tmp_path: Path, tokenizer: PreTrainedTokenizerBase):
    starting = adding(tokenizer, "<s> $A </s>")
    assert encode_text("<s> w0", starting) == encode_text("w0", starting) == [1, 4]
    assert encode_text("w0 <s>", starting) == [1, 4, 1]
    path = write(tmp_path / "p.jsonl", {"prompt": "<s> w0 w1 w2"})
    [prompt] = load_prompts(path, starting, max_tokens=3, too_long="truncate")
    assert prompt.tokens == (1, 5, 6)
    [prompt] = load_prompts(path, starting, max_tokens=4)
    assert prompt.tokens == (1, 4, 5, 6)


def test_special_tokens_before_a_prompt_stay_and_those_after_it_do_not(tokenizer: PreTrainedTokenizerBase):
    assert encode_text("w0 </s>", adding(tokenizer, "<s> $A </s>")) == [1, 4, 2]
    assert encode_text("w0", adding(tokenizer, "$A </s>")) == [4]


def test_a_cut_prompt_keeps_its_start_token(tmp_path: Path, tokenizer: PreTrainedTokenizerBase):
    path = write(tmp_path / "p.jsonl", {"prompt": "w0 w1 w2 w3"})
    [prompt] = load_prompts(path, adding(tokenizer, "<s> $A </s>"), max_tokens=3, too_long="truncate")
    assert (prompt.tokens, prompt.text) == ((1, 6, 7), "w2 w3")


def test_a_chat_goes_through_the_template_with_nothing_added(tokenizer: PreTrainedTokenizerBase):
    tokenizer.chat_template = CHAT
    prompt = encode_prompt([{"role": "user", "content": "w0"}], adding(tokenizer, "<s> $A </s>"))
    assert prompt.text == "<s> w0 </s> <s>"
    assert prompt.tokens == (1, 4, 2, 1)


def test_a_chat_needs_a_template(tokenizer: PreTrainedTokenizerBase):
    with pytest.raises(DataError, match="no chat template"):
        encode_prompt([{"role": "user", "content": "w0"}], tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="refuses these messages: roles must alternate"):
        encode_prompt([{"role": "user", "content": "w0"}], tokenizer)
