"""The judge: its figures are what they are called, and no answer depends on the batch around it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from keel.config import DecodingSettings, EvaluateConfig, PromptSettings, SampleConfig, parse
from keel.data.batches import Rollouts
from keel.errors import ConfigError
from keel.train.evaluate import bootstrap_interval, comparison, evaluate
from keel.train.sample import Player, load_player, sample_answers

DECODING = DecodingSettings(num_responses=3, max_response_tokens=5)


def count_w5(completions: list[str], **columns: object) -> list[float]:
    return [float(text.split().count("w5")) for text in completions]


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    rows = [
        {"text": "w1 w2", "topic": 1, "ranks": [1]},
        {"text": "w3", "topic": 2},
        {"text": "w4 w5 w6 w7", "topic": 3},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def player(tiny_policy: Path, prompts: str) -> Player:
    return load_player(str(tiny_policy), PromptSettings(path=prompts, column="text"), DECODING)


def settings(policy: Path, prompts: str, **more: object) -> EvaluateConfig:
    base = {"policy": str(policy), "prompts": {"path": prompts, "column": "text"}, "sampling": DECODING.model_dump()}
    return parse(EvaluateConfig, {**base, **more})


def test_interval_of_a_constant_is_a_point():
    assert bootstrap_interval(torch.full((7,), 0.25), seed=0) == (0.25, 0.25)


def test_interval_has_the_width_of_the_normal_one():
    values = (torch.arange(400) % 2).double()  # mean 1/2, standard deviation 1/2
    low, high = bootstrap_interval(values, seed=1)
    assert low == pytest.approx(0.5 - 1.96 * 0.5 / 20, abs=0.004)
    assert high == pytest.approx(0.5 + 1.96 * 0.5 / 20, abs=0.004)
    assert bootstrap_interval(values, seed=1) == (low, high)
    narrow = bootstrap_interval(values, seed=1, level=0.5)
    assert low < narrow[0] < 0.5 < narrow[1] < high


def test_win_rate_counts_all_pairs_of_a_prompt_and_ties_half():
    ours, theirs = torch.tensor([[1.0, 2.0], [5.0, 5.0]]), torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    figures = comparison(ours, theirs, seed=0)
    assert figures["win_rate"] == pytest.approx(((0.5 + 0 + 1 + 0) / 4 + 1) / 2)
    assert figures["ties"] == 1 / 8
    assert figures["score_difference"] == pytest.approx((-0.5 + 5) / 2)
    assert (figures["win_rate_low"], figures["win_rate_high"]) == (0.375, 1.0)


def test_a_policy_can_answer_more_often_than_the_other():
    figures = comparison(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2.0]]), seed=0)
    assert (figures["win_rate"], figures["score_difference"]) == (0.5, 0.0)


def test_answers_do_not_depend_on_the_batch_size(player: Player):
    def texts(batch_size: int) -> list[str]:
        decoding = DECODING.model_copy(update={"batch_size": batch_size})
        return [text for rollouts in player.answers(decoding, 3, "x") for text in rollouts.texts]

    assert texts(64) == texts(4) == texts(1)
    assert len(set(texts(64))) > 1


def rows(rollouts: Rollouts, row: int) -> tuple[list[int], list[int]]:
    return list(rollouts.prompts[row].tokens), rollouts.response_tokens[row][rollouts.response_mask[row]].tolist()


def test_figures_are_those_of_plain_transformers(player: Player, tiny_policy: Path, tiny_gpt2: Path, prompts: str):
    """kl = mean over answers of the summed k1; entropy and reference_logprob = means over tokens."""
    from transformers import AutoModelForCausalLM

    config = settings(tiny_policy, prompts, reference=str(tiny_gpt2), seed=4)
    figures = evaluate(config)
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (tiny_policy, tiny_gpt2)]
    kl, entropy, reference_logprob, lengths, ends = [], [], [], [], []
    for rollouts in player.answers(DECODING, 4, "evaluate", "policy"):
        for row in range(len(rollouts.texts)):
            prompt, response = rows(rollouts, row)
            with torch.no_grad():
                own, theirs = (
                    model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                    for model in models
                )
            chosen = torch.tensor(response).unsqueeze(1)
            kl.append(float((own - theirs).gather(1, chosen).sum()))
            entropy += (-(own.exp() * own).sum(-1)).tolist()
            reference_logprob += theirs.gather(1, chosen).squeeze(1).tolist()
            lengths.append(len(response))
            ends.append(response[-1] == 2)
    expected = {
        "kl": sum(kl) / 9,
        "entropy": sum(entropy) / len(entropy),
        "reference_logprob": sum(reference_logprob) / len(entropy),
        "length": sum(lengths) / 9,
        "truncated": 1 - sum(ends) / 9,
    }
    assert figures == {
        "prompts": 3,
        "responses_per_prompt": 3,
        "policy": {name: pytest.approx(value, abs=1e-4) for name, value in expected.items()},
    }


def test_two_policies(tiny_policy: Path, tiny_gpt2: Path, prompts: str, tmp_path: Path):
    config = settings(tiny_policy, prompts, against=str(tiny_gpt2), output=str(tmp_path / "deep" / "figures.json"))
    figures = evaluate(config, [count_w5])
    assert figures["against"]["kl"] == 0.0
    assert figures["policy"]["kl"] > 0.1
    assert figures["policy"]["score"] == figures["policy"]["rewards/count_w5"]
    assert figures["score_difference"] == pytest.approx(figures["policy"]["score"] - figures["against"]["score"])
    assert figures["win_rate_low"] <= figures["win_rate"] <= figures["win_rate_high"]
    record = json.loads((tmp_path / "deep" / "figures.json").read_text())
    assert record["figures"] == figures
    assert [row["prompt"] for row in record["answers"]] == ["w1 w2", "w3", "w4 w5 w6 w7"]
    shown = [score for row in record["answers"] for score in row["against_scores"]]
    assert sum(shown) / 9 == pytest.approx(figures["against"]["score"])
    assert all(count_w5(row["policy"]) == row["policy_scores"] for row in record["answers"])


def test_a_policy_is_no_better_than_itself(tiny_policy: Path, prompts: str):
    figures = evaluate(
        settings(tiny_policy, prompts, against=str(tiny_policy)), [lambda completions: [1.0] * len(completions)]
    )
    assert (figures["win_rate"], figures["ties"], figures["score_difference"]) == (0.5, 1.0, 0.0)
    assert figures["policy"]["kl"] == 0.0
    assert figures["policy"]["length"] != figures["against"]["length"]  # each side draws its own numbers


def test_kl_needs_one_vocabulary(tiny_policy: Path, prompts: str, tmp_path: Path):
    other = shutil.copytree(tiny_policy, tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text().replace('"w27"', '"x27"'))
    figures = evaluate(settings(tiny_policy, prompts, against=str(other)), [count_w5])
    assert "kl" not in figures["policy"]
    assert figures["against"]["kl"] == 0.0
    with pytest.raises(ConfigError, match="vocabulary"):
        evaluate(settings(tiny_policy, prompts, reference=str(other)))


def test_sample_writes_rows_to_rank(tiny_policy: Path, prompts: str, tmp_path: Path):
    config = parse(
        SampleConfig,
        {
            "model": str(tiny_policy),
            "prompts": {"path": prompts, "column": "text"},
            "output": str(tmp_path / "answers.jsonl"),
            "sampling": {"num_responses": 2, "max_response_tokens": 5, "batch_size": 4, "top_k": 1},
        },
    )
    written = sample_answers(config)
    found = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [(row["text"], row["topic"]) for row in found] == [("w1 w2", 1), ("w3", 2), ("w4 w5 w6 w7", 3)]
    assert all(row.keys() == {"text", "topic", "responses"} for row in found)  # ranks spoke of other answers
    assert all(len(set(row["responses"])) == 1 for row in found)  # the most likely token leaves no choice
    assert (written["prompts"], written["responses"]) == (3, 6)


def test_what_cannot_fit_is_refused(tiny_policy: Path, prompts: str):
    with pytest.raises(ConfigError, match=r"longest prompt and answer have 258 tokens, the model only 256 positions"):
        evaluate(settings(tiny_policy, prompts, sampling={"max_response_tokens": 254}))
