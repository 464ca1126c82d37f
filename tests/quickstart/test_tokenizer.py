"""Every text of the world survives the tokenizer, and the untrained model is a plain model folder."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from keel.quickstart.corpus import SPLITS, pretraining_corpus, prompts, sft_data
from keel.quickstart.tokenizer import build_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def test_every_text_comes_back(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = pretraining_corpus(0, 500) + [prompt for split in SPLITS for prompt in prompts(0, 200, split)]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == f"<s> {text.replace('</s>', ' </s>')}"
    for row in sft_data(0, 500):
        text = f"{row['prompt']} {row['completion']}"
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
        ids = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == row["completion"]
        assert 3 <= len(ids) <= 39  # one more for the end fits the quickstart's limit


def test_a_beginning_is_put_in_front_and_no_end_behind(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("customer: hello.")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "customer", ":", "hello", "."]
    assert tokenizer("Hello", add_special_tokens=False)["input_ids"] == [ids[3]]
    assert tokenizer("hello.</s>", add_special_tokens=False)["input_ids"] == [*ids[3:], tokenizer.eos_token_id]


def test_prompt_and_completion_meet_between_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    for row in sft_data(1, 200):
        parts = tokenizer(row["prompt"])["input_ids"]
        parts += tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        assert tokenizer(f"{row['prompt']} {row['completion']}")["input_ids"] == parts
        assert tokenizer(row["prompt"] + row["completion"])["input_ids"] == parts


def test_the_vocabulary_is_small_and_always_the_same(tokenizer: PreTrainedTokenizerFast) -> None:
    assert 100 <= len(tokenizer) <= 300
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<pad>", "<s>", "</s>", "<unk>"]
    assert build_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_the_untrained_model_is_a_plain_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        tiny_llama(tmp_path / name, tokenizer, seed)
    assert torch.equal(torch.get_rng_state(), before)
    one, again, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "again", "other"))
    assert torch.equal(one.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert one.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert one.config.vocab_size == len(tokenizer)
    assert one.num_parameters() < 300_000
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "one")
    for text in pretraining_corpus(0, 50):
        assert reloaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert reloaded.decode(reloaded(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    assert (reloaded.pad_token, reloaded.bos_token, reloaded.eos_token) == ("<pad>", "<s>", "</s>")
