"""Which tokens of an example are learned."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from keel.data.examples import ExampleFormat, load_examples
from keel.data.notes import Notes
from keel.data.turns import Example
from keel.errors import DataError

ENDS = [2]


@pytest.fixture
def tokenizer(tiny_policy: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_policy)


def load(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, *rows: dict[str, Any], **options: Any) -> list[Example]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_examples(str(path), ExampleFormat(tokenizer, options.pop("ends", ENDS), **options))[0]


def test_the_completion_and_its_end_are_learned(tmp_path: Path, tokenizer: PreTrainedTokenizerBase):
    [example] = load(tmp_path, tokenizer, {"prompt": "w0 w1", "completion": " w2 w3"})
    assert example == Example("w0 w1", (4, 5, 6, 7, 2), 2)
    assert example.num_targets == 3


def test_all_of_a_plain_text_is_learned(tmp_path: Path, tokenizer: PreTrainedTokenizerBase):
    [example] = load(tmp_path, tokenizer, {"text": "w0 w1"})
    assert (example.tokens, example.num_prompt_tokens, example.num_targets) == ((4, 5, 2), 0, 2)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    [example] = load(tmp_path, tokenizer, {"text": "w0 w1"})
    assert (example.tokens, example.num_targets) == ((1, 4, 5, 2), 3)


def test_a_start_that_the_rows_spell_is_not_doubled(tmp_path: Path, tokenizer: PreTrainedTokenizerBase):
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    examples = load(tmp_path, tokenizer, {"text": "<s> w0"}, {"prompt": "<s> w0 w1 w2", "completion": " w3"})
    assert [example.tokens for example in examples] == [(1, 4, 2), (1, 4, 5, 6, 7, 2)]
    [example] = load(tmp_path, tokenizer, {"prompt": "<s> w0 w1 w2", "completion": " w3"}, max_tokens=4)
    assert (example.tokens, example.num_prompt_tokens) == ((1, 6, 7, 2), 2)


def test_an_empty_completion_teaches_to_end(tmp_path: Path, tokenizer: PreTrainedTokenizerBase):
    [example] = load(tmp_path, tokenizer, {"prompt": "w0", "completion": ""})
    assert (example.tokens, example.num_targets) == ((4, 2), 1)


def test_the_end_is_not_doubled(tmp_path: Path, tokenizer: PreTrainedTokenizerBase):
    [example] = load(tmp_path, tokenizer, {"prompt": "w0", "completion": " w1 </s>"})
    assert example.tokens == (4, 5, 2)


def test_an_end_token_inside_a_text_cuts_nothing(tmp_path: Path, tokenizer: PreTrainedTokenizerBase):
    [example] = load(tmp_path, tokenizer, {"prompt": "w0", "completion": " w1 </s> w2"})
    assert example.tokens == (4, 5, 2, 6, 2)


def test_the_end_is_one_that_stops_the_model(tmp_path: Path, tokenizer: PreTrainedTokenizerBase):
    [example] = load(tmp_path, tokenizer, {"prompt": "w0", "completion": " w1"}, ends=[9])
    assert example.tokens == (4, 5, 9)


def test_a_chat_ends_where_its_template_ends_it(tmp_path: Path, tokenizer: PreTrainedTokenizerBase):
    tokenizer.chat_template = (
        "{% for m in messages %}<s> {{ m.content }} </s> w9 {% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
    )
    rows = [
        {"prompt": [{"role": "user", "content": "w0"}], "completion": [{"role": "assistant", "content": "w1"}]},
        {"prompt": [{"role": "user", "content": "w0"}], "completion": "w1"},
    ]
    for example in load(tmp_path, tokenizer, *rows):
        assert (example.tokens, example.num_prompt_tokens) == ((1, 4, 2, 13, 1, 5, 2), 5)


def test_a_long_example_loses_its_prompts_beginning_and_then_its_end(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
):
    rows = [{"prompt": "w0 w1 w2", "completion": " w3"}, {"prompt": "w0", "completion": " w1 w2 w3"}]
    first, second = load(tmp_path, tokenizer, *rows, max_tokens=3)
    assert (first.tokens, first.num_targets) == ((6, 7, 2), 2)
    assert (second.tokens, second.num_targets) == ((4, 5, 6), 2)
    with pytest.raises(DataError, match="no row has a token to learn within 1 tokens"):
        load(tmp_path, tokenizer, *rows, max_tokens=1)


def test_prompt_and_completion_are_tokenized_together(shared_dir: Path, tmp_path: Path):
    """Encoded alone, the completion would begin with an additional space."""
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "models" / "stories260K")
    [example] = load(tmp_path, tokenizer, {"prompt": "Once upon a time", "completion": " there was"})
    assert list(example.tokens) == [*tokenizer.encode("Once upon a time there was"), 2]
    assert example.num_prompt_tokens == len(tokenizer.encode("Once upon a time"))


@pytest.mark.parametrize(
    "row", [{"completion": "x"}, {"prompt": "w0"}, {"prompt": "w0", "completion": 3}, {"text": " "}]
)
def test_a_bad_row_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]):
    with pytest.raises(DataError) as caught:
        load(tmp_path, tokenizer, {"text": "w0"}, row)
    assert caught.value.where == f"{tmp_path / 'rows.jsonl'}:2"


def test_an_ignored_weight_is_reported(tmp_path: Path, tokenizer: PreTrainedTokenizerBase):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "w0", "weight": 1.0}, {"text": "w1", "weight": 0.5}, {"text": "w2", "weight": None}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    notes = Notes()
    load_examples(str(path), ExampleFormat(tokenizer, ENDS), notes=notes)
    assert list(notes.rows.values()) == [{2}]
