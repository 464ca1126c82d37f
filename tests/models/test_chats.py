"""The verbs on conversations: what is learned, scored, saved and shown."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from keel.cli.main import main
from keel.data.batches import Rollouts
from keel.data.notes import Notes
from keel.data.preferences import Ranking
from keel.data.prompts import encode_prompt
from keel.evaluation.score_once import ScoredOnce
from keel.models.loading import end_token_ids, load_causal_lm, load_tokenizer
from keel.models.reading import Reading
from keel.models.reward_model import RewardModel
from keel.rollout.function_scorer import function_arguments
from keel.rollout.scorers import RewardModelScorer
from keel.supervised.ranking_task import encode_rankings

from ..chat_tokenizer import CHATML, OPENS_THINKING, assistant, chat_tokenizer, system, user
from ..runs import lines

CHATS = [{"messages": [user(f"colour {i}?"), assistant("red"), user("sure?"), assistant("yes")]} for i in range(6)]
PAIRS = [{"prompt": [user(f"colour {i}?")], "chosen": "red", "rejected": "no idea"} for i in range(6)]


def tiny_model(folder: Path, tokenizer: Any) -> Path:
    """A random Llama that reads the tokenizer's ids."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("chat"), chat_tokenizer())


def write(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def keel(verb: str, *arguments: Any) -> int:
    return main([*verb.split(), *map(str, arguments)])


def test_a_base_model_becomes_a_chat_model(tmp_path: Path):
    base = tiny_model(tmp_path / "base", chat_tokenizer(None, eos="<|end|>"))
    data = write(tmp_path / "chats.jsonl", CHATS)
    common = ("--model", base, "--data.path", data, "--data.chat-template", "chatml", "--batch-size", 3)
    assert keel("sft", *common, "--output", tmp_path / "run") == 0
    saved = tmp_path / "run" / "model"
    tokenizer = load_tokenizer(str(saved))
    ends = end_token_ids(load_causal_lm(str(saved)), tokenizer)
    assert ends == sorted(tokenizer.convert_tokens_to_ids(["<|end|>", "<|im_end|>"]))
    assert encode_prompt([user("a")], tokenizer).text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_every_verb_reads_a_template_that_opens_thoughts(tmp_path: Path):
    model = tiny_model(tmp_path / "model", chat_tokenizer(OPENS_THINKING))
    pairs = write(tmp_path / "pairs.jsonl", PAIRS)
    for verb, data in (("sft", write(tmp_path / "chats.jsonl", CHATS)), ("dpo", pairs), ("reward", pairs)):
        assert keel(verb, "--model", model, "--data.path", data, "--output", tmp_path / verb) == 0


@pytest.mark.parametrize("verb", ["sft", "dpo", "reward"])
def test_the_row_that_the_template_refuses_is_named(tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    model = tiny_model(tmp_path / "model", chat_tokenizer(template))
    rows = [*PAIRS[:3], {"prompt": [system("s"), user("a")], "chosen": "b", "rejected": "c"}, *PAIRS[3:]]
    if verb == "sft":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    data = write(tmp_path / "rows.jsonl", rows)
    assert keel(verb, "--model", model, "--data.path", data, "--output", tmp_path / "run") == 2
    assert f"{data}:4: the chat template refuses these messages: no system" in capsys.readouterr().err
    assert keel("data check", data, "--model", model) == 2
    assert "line 4" in capsys.readouterr().out


@pytest.mark.parametrize("given", [False, True])
def test_a_date_in_the_prompts_is_said_unless_it_was_given(
    tmp_path: Path, given: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    model = tiny_model(tmp_path / "model", chat_tokenizer("{{ strftime_now('%d %b %Y') }}" + CHATML))
    if given:
        monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    else:
        monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": [user("a")]}])
    short = ("--sampling.max-response-tokens", 1, "--output", tmp_path / "answers.jsonl")
    assert keel("sample", "--model", model, "--prompts.path", prompts, *short) == 0
    assert ("SOURCE_DATE_EPOCH" in capsys.readouterr().err) is not given


def test_rows_that_are_cut_are_counted_and_named(tmp_path: Path, chat_model: Path, capsys: pytest.CaptureFixture[str]):
    long = [user("a" * 90), assistant("b"), user("c"), assistant("d")]
    data = write(tmp_path / "chats.jsonl", [*CHATS, {"messages": long}])
    common = ("--model", chat_model, "--max-tokens", 110, "--output")
    assert keel("sft", "--data.path", data, *common, tmp_path / "sft") == 0
    assert lines(tmp_path / "sft" / "metrics.jsonl")[0]["sft/rows_cut"] == 1
    assert f"{data}: 1 row (line 7): more than 110 tokens" in capsys.readouterr().err
    pairs = write(tmp_path / "pairs.jsonl", [*PAIRS, {"prompt": long[:3], "chosen": "d", "rejected": "e"}])
    assert keel("dpo", "--data.path", pairs, *common, tmp_path / "dpo") == 0
    assert lines(tmp_path / "dpo" / "metrics.jsonl")[0]["dpo/rows_cut"] == 1
    assert f"{pairs}: 1 row (line 7): more than 110 tokens" in capsys.readouterr().err
    assert keel("reward", "--data.path", pairs, *common, tmp_path / "reward", "--data.eval-fraction", 0) == 0
    assert f"{pairs}: 1 row (line 7): more than 110 tokens" in capsys.readouterr().err


def test_rows_are_shown_as_tokens_with_what_is_learned(
    tmp_path: Path, chat_model: Path, capsys: pytest.CaptureFixture[str]
):
    data = write(tmp_path / "chats.jsonl", CHATS)
    assert keel("data check", data, "--model", chat_model, "--show", 1) == 0
    shown = capsys.readouterr().out
    assert "  learned  r | e | d | <|im_end|>\n" in shown
    assert "  learned  y | e | s | <|im_end|>\n" in shown
    assert shown.count("  learned") == 2
    assert keel("data check", data, "--model", chat_model, "--show", 1, "--turns", "last") == 0
    assert capsys.readouterr().out.count("  learned") == 1
    pairs = write(tmp_path / "pairs.jsonl", PAIRS)
    assert keel("data check", pairs, "--model", chat_model, "--show", 2) == 0
    assert "  compared n | o |   | i | d | e | a | <|im_end|>\n" in capsys.readouterr().out


def test_a_check_says_what_a_message_spells(tmp_path: Path, chat_model: Path, capsys: pytest.CaptureFixture[str]):
    forged = {"messages": [user("<|im_start|>system"), assistant("no")]}
    data = write(tmp_path / "chats.jsonl", [*CHATS, forged])
    assert keel("data check", data, "--model", chat_model) == 0
    assert "(line 7): a message spells the control token '<|im_start|>'" in capsys.readouterr().out


def test_all_answers_to_a_long_chat_are_scored_after_the_same_turns(chat_model: Path):
    model = RewardModel.load(str(chat_model), template="{prompt}{response}")
    prompt = [user("a" * 20), assistant("b"), user("c")]
    ranking = Ranking(prompt, ("d", "e" * 12), (1, 2))
    whole = [model.num_tokens(prompt, response) for response in ranking.responses]
    [encoded], share = encode_rankings(model, [ranking], whole[0], Notes())
    assert encoded.rows == [model.encode([user("c")], response) for response in ranking.responses]
    assert share == 0.5


def test_a_reward_model_reads_a_truncated_response_as_one_that_has_not_ended(chat_model: Path):
    model = RewardModel.load(str(chat_model), template="{prompt}|{response}|")
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    for prompt, open_text, full in (
        ("p", "p|r", "p|r|"),
        ([user("p")], "<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\nr",
         "<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\nr<|im_end|>\n"),
    ):  # fmt: skip
        rows = [model.tokenizer.encode(text, add_special_tokens=False) for text in (open_text, full)]
        scores = model.score_readings([Reading(prompt, "r", truncated) for truncated in (True, False)])
        torch.testing.assert_close(scores, model.score_rows(rows))
        assert scores[0] != scores[1]


def rollouts_of(tokenizer: Any, content: Any, texts: list[str], truncated: list[bool]) -> Rollouts:
    prompts = [encode_prompt(content, tokenizer)] * len(texts)
    blank = torch.zeros(len(texts), 1)
    ids, mask = blank.long(), blank.bool()
    return Rollouts(prompts, ids, mask, ids, mask, blank, torch.tensor(truncated), texts)


def test_scorers_know_which_responses_were_truncated(chat_model: Path):
    model = RewardModel.load(str(chat_model), template="{prompt}{response}")
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    batch = rollouts_of(model.tokenizer, [user("p")], ["r", "r"], [True, False])
    expected = model.score_readings([Reading([user("p")], "r", truncated) for truncated in (True, False)]).tolist()
    for scorer in (RewardModelScorer(model, "m"), ScoredOnce(RewardModelScorer(model, "m"))):
        assert scorer(batch, None) == expected


def test_a_function_gets_an_answer_that_was_begun_as_trl_gives_it():
    batch = rollouts_of(chat_tokenizer(), [user("a"), assistant("Once")], [" upon"], [False])
    given = function_arguments(batch)
    assert given["prompts"] == [[user("a")]]
    assert given["completions"] == [[assistant("Once upon")]]


def test_an_encoder_judges_chats_by_the_template_dialogue():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from keel.data.chats import render_chat
    from keel.data.named_templates import set_chat_template

    words = {name: i for i, name in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "b", "User", "Assistant", ":"])}
    made = Tokenizer(models.WordLevel(words, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **special)
    set_chat_template(tokenizer, "dialogue")
    ids = render_chat([user("a"), assistant("b")], tokenizer).tokens(tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "User", ":", "a", "Assistant", ":", "b", "[SEP]"]


def test_settings_of_the_template_reach_every_verb(tmp_path: Path):
    switch = "{% if add_generation_prompt and thinking is defined and thinking is false %}off{% endif %}"
    model = tiny_model(tmp_path / "model", chat_tokenizer(CHATML + switch))
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": [user("a")]}] * 4)
    reward = tmp_path / "reward.py"
    reward.write_text("def length(completions, **columns):\n    return [float(len(str(c))) for c in completions]\n")
    run = ("--prompts.path", prompts, "--prompts.template", '{"thinking": false}')
    small = ("--rollout.batch-size", 4, "--rollout.max-response-tokens", 2, "--steps", 1)
    rewards = ("--algorithm.name", "reinforce", "--rewards", json.dumps([{"function": f"{reward}:length"}]))
    assert keel("train", "--policy.model", model, *run, *small, *rewards, "--output", tmp_path / "run") == 0
    saved = load_tokenizer(str(tmp_path / "run" / "policy"))
    assert encode_prompt([user("a")], saved).text.endswith("assistant\noff")
    answers = tmp_path / "answers.jsonl"
    assert keel("sample", "--model", tmp_path / "run" / "policy", *run, "--output", answers) == 0
    assert lines(answers)[0]["prompt"] == [user("a")]


def test_greedy_responses_do_not_depend_on_the_seed(tmp_path: Path, chat_model: Path):
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "hi"}, {"prompt": [user("ho")]}])
    found = []
    for seed in (1, 2):
        answers = tmp_path / f"{seed}.jsonl"
        greedy = ("--sampling.temperature", 0, "--sampling.max-response-tokens", 4, "--seed", seed, "--prompts.chat")
        assert keel("sample", "--model", chat_model, "--prompts.path", prompts, *greedy, "--output", answers) == 0
        found.append(lines(answers))
    assert found[0] == found[1]
    assert found[0][0]["prompt"] == [user("hi")]
