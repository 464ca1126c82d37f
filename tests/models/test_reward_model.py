"""The reward model scores a text as plain transformers scores it alone, whatever stands around it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from keel.errors import ConfigError, DataError
from keel.models.ensemble import RewardEnsemble
from keel.models.reading import Reading
from keel.models.reward_model import RewardModel

KINDS = ["llama", "gpt2", "bert", "roberta"]


def randomised(model: RewardModel) -> RewardModel:
    """A head that is not zero, so that scores tell texts apart."""
    with torch.no_grad():
        for weight in model.model.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * 0.05)
    return model


def encoder(kind: str, pad_id: int, folder: Path, tokenizer_of: Path) -> Path:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 64, "num_labels": 1, "pad_token_id": pad_id}
    torch.manual_seed(5)
    model = (
        BertForSequenceClassification(BertConfig(**sizes))
        if kind == "bert"
        else RobertaForSequenceClassification(RobertaConfig(**sizes))
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    tokenizer.model_max_length = 60
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=KINDS)
def any_model(request: pytest.FixtureRequest, tiny_policy: Path, tiny_gpt2: Path, tmp_path: Path) -> RewardModel:
    kind = request.param
    if kind in ("bert", "roberta"):
        folder = encoder(
            kind, 0 if kind == "bert" else 2, tmp_path / kind, tiny_policy if kind == "bert" else tiny_gpt2
        )
    else:
        folder = tiny_policy if kind == "llama" else tiny_gpt2
    return randomised(RewardModel.load(str(folder), template="{prompt} {response}"))


# Among the texts: pad and end tokens inside, one that ends in them, one of a single word, an empty answer.
PROMPTS = ["w0 w1", "w2", "w3 <pad> w4", "w5 w6 w7", "w8", "w9 w10"]
RESPONSES = ["w1 w2 w3 w4 w5", "w3", "w1 </s> w5", "w6 <pad> </s>", "w1", ""]


def test_batched_scores_are_those_of_plain_transformers_alone(any_model: RewardModel, tmp_path: Path):
    any_model.save(tmp_path / "saved")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    assert plain.config.num_labels == 1
    assert plain.config.pad_token_id is not None
    rows = [any_model.encode(*pair) for pair in zip(PROMPTS, RESPONSES, strict=True)]
    with torch.no_grad():
        alone = torch.cat([plain(input_ids=torch.tensor([row])).logits[:, 0] for row in rows])
    assert alone.std() > 1e-3
    assert torch.allclose(any_model.score(PROMPTS, RESPONSES), alone, atol=1e-5)
    again = RewardModel.load(str(tmp_path / "saved"))
    assert again.template == "{prompt} {response}"
    assert torch.allclose(again.score(PROMPTS, RESPONSES), alone, atol=1e-5)


def test_the_side_and_content_of_padding_do_not_matter(any_model: RewardModel):
    rows = [any_model.encode(*pair) for pair in zip(PROMPTS, RESPONSES, strict=True)]
    expected = any_model.score_rows(rows)
    width = max(map(len, rows)) + 3
    for side in ("left", "right", "both"):
        for pad_id in (0, 2, 9) if any_model.reads_last_token else (0,):
            tokens = torch.full((len(rows), width), pad_id)
            mask = torch.zeros(tokens.shape, dtype=torch.bool)
            for i, row in enumerate(rows):
                start = {"left": width - len(row), "right": 0, "both": (width - len(row)) // 2}[side]
                tokens[i, start : start + len(row)] = torch.tensor(row)
                mask[i, start : start + len(row)] = True
            with torch.no_grad():
                assert torch.allclose(any_model.compute_scores(tokens, mask), expected, atol=1e-5)


def test_neither_batching_nor_order_matters(any_model: RewardModel):
    expected = any_model.score(PROMPTS, RESPONSES)
    rows = [any_model.encode(*pair) for pair in zip(PROMPTS, RESPONSES, strict=True)]
    for budget in (1, 12, 1000):
        assert torch.allclose(any_model.score_rows(rows, budget), expected, atol=1e-5)
    assert torch.allclose(any_model.score_rows(rows[::-1]), expected.flip(0), atol=1e-5)


def test_every_token_is_read(any_model: RewardModel):
    one, other = any_model.score(["w0 w1", "w0 w2"], ["w3 </s> w4", "w3 </s> w4"]).tolist()
    assert abs(one - other) > 1e-6


def test_a_new_head_starts_at_zero(tiny_policy: Path):
    assert RewardModel.load(str(tiny_policy), template="{response}").score(["w0"], ["w1"]).tolist() == [0.0]


def test_the_template_is_filled_in_one_pass(tiny_policy: Path):
    model = RewardModel.load(str(tiny_policy), template="w9 {prompt} {response} {x}")
    words = model.tokenizer.decode(model.encode("{response}", "w1")).split()
    assert words == ["w9", "<unk>", "w1", "<unk>"]
    with pytest.raises(ConfigError, match="does not contain"):
        RewardModel.load(str(tiny_policy), template="{prompt}")


def test_a_chat_is_scored_through_the_chat_template(tiny_policy: Path):
    model = RewardModel.load(str(tiny_policy), template="{response}")
    chat = [{"role": "user", "content": "w0"}]
    with pytest.raises(DataError, match="no chat template"):
        model.encode(chat, "w1")
    model.tokenizer.chat_template = "{% for m in messages %}<s> {{ m.content }} {% endfor %}"
    assert model.encode(chat, "w1") == [1, 4, 1, 5]


def test_a_start_that_the_prompt_spells_is_not_doubled(tiny_policy: Path):
    model = RewardModel.load(str(tiny_policy), template="{prompt} {response}")
    assert model.encode("<s> w0", "w1") == [1, 4, 5]
    assert model.encode("<s> <s> w0", "w1") == [1, 1, 4, 5]
    model.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert model.encode("<s> w0", "w1") == model.encode("w0", "w1") == [1, 4, 5]


def test_the_training_limit_limits_no_text_that_is_scored(tiny_policy: Path, tmp_path: Path):
    model = RewardModel.load(str(tiny_policy), template="{prompt} {response}", max_tokens=3)
    assert model.encode_within(Reading("w0 w1", "w2 w3"), 3) == ([5, 6, 7], True)
    model.save(tmp_path / "saved")
    again = RewardModel.load(str(tmp_path / "saved"))
    assert again.encode("w0 w1", "w2 w3") == [4, 5, 6, 7]
    assert (again.max_tokens, again.limit) == (3, 256)
    again.score(["w0 w1"], ["w2 w3"])
    assert again.cut == [False]


def limited(folder: Path, limit: int, target: Path) -> RewardModel:
    """A saved model whose tokenizer says that it reads so many tokens."""
    model = randomised(RewardModel.load(str(folder), template="{prompt} {response}"))
    model.tokenizer.model_max_length = limit
    model.save(target)
    return RewardModel.load(str(target))


def test_texts_longer_than_the_model_can_read_lose_their_beginning_and_are_counted(tiny_policy: Path, tmp_path: Path):
    model = limited(tiny_policy, 3, tmp_path / "model")
    assert (model.limit, model.limited_by) == (3, "tokenizer.model_max_length")
    assert model.num_tokens("w0 w1", "w2 w3") == 4
    assert model.encode("w0 w1", "w2 w3") == [5, 6, 7]
    scores = model.score(["w0 w1", "w9 w1", "w1"], ["w2 w3", "w2 w3", "w2 w3"])
    assert model.cut == [True, True, False]
    assert scores[0] == scores[1] == scores[2]
    full = RewardModel.load(str(tiny_policy), template="{response}")
    assert full.limited_by in ("tokenizer.model_max_length", "max_position_embeddings")


def test_an_ensemble_counts_texts_that_one_member_cannot_read(tiny_policy: Path, tmp_path: Path):
    members = [limited(tiny_policy, limit, tmp_path / str(limit)) for limit in (3, 8)]
    ensemble = RewardEnsemble(members)
    ensemble.score(["w0 w1", "w1"], ["w2 w3", "w2 w3"])
    assert ensemble.cut == [True, False]


def test_positions_of_roberta_begin_behind_its_pad_token(tiny_gpt2: Path, tmp_path: Path):
    """64 positions, of which those up to the pad token's number (2) are no token's."""
    folder = encoder("roberta", 2, tmp_path / "roberta", tiny_gpt2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 10**9
    tokenizer.save_pretrained(folder)
    model = RewardModel.load(str(folder))
    assert (model.limit, model.limited_by) == (61, "max_position_embeddings")
    assert model.score(["w1 " * 80], ["w2"]).isfinite().all()


def test_only_the_adapter_and_the_head_learn_and_both_are_saved(tiny_policy: Path, tmp_path: Path):
    pytest.importorskip("peft")
    from keel.config import LoraSettings

    model = RewardModel.load(str(tiny_policy), template="{prompt} {response}", lora=LoraSettings(r=2))
    trained = [name for name, weight in model.model.named_parameters() if weight.requires_grad]
    assert all("lora" in name or "score" in name for name in trained)
    with torch.no_grad():
        for weight in model.model.parameters():
            if weight.requires_grad:
                weight.add_(0.02)
    scores = model.score(PROMPTS, RESPONSES)
    model.save(tmp_path / "saved")
    assert scores.std() > 1e-4
    assert torch.allclose(RewardModel.load(str(tmp_path / "saved")).score(PROMPTS, RESPONSES), scores, atol=1e-5)
