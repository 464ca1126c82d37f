"""Reward modelling: known preferences are recovered, splitting a step changes nothing, the report is what it says."""

import json
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

from keel.config import RewardConfig, parse
from keel.core.preferences import bradley_terry_loss
from keel.data.preferences import Ranking
from keel.errors import ConfigError
from keel.learn.comparisons import Comparisons, listwise_losses, pairwise_losses
from keel.models.reward_model import RewardModel
from keel.stats.preference_metrics import Pairs, baselines, calibration_error, compute_preference_metrics
from keel.supervised import loop as supervised
from keel.supervised.learner import SupervisedTask
from keel.supervised.loop import accumulate
from keel.supervised.ranking_task import EncodedRanking, ranking_losses
from keel.supervised.reward import reward
from keel.supervised.split import split_rankings
from keel.world import ALONE

A_WINS = {"prompt": "w0", "chosen": " w1 w2", "rejected": " w3"}
B_WINS = {"prompt": "w0", "chosen": " w3", "rejected": " w1 w2"}


def config(tmp_path: Path, model: Path, rows: list[dict[str, Any]], **settings: Any) -> RewardConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(path), "eval_path": str(path)}
    given = {"output": str(tmp_path / "run"), "model": str(model), "data": data, "batch_size": 4, "center_coef": 0.0}
    optim = {"learning_rate": 0.01, "schedule": "linear"}
    return parse(RewardConfig, {**given, "optim": optim, **settings})


def scores_of(run: Path) -> tuple[float, float]:
    model = RewardModel.load(str(run / "model"))
    a, b = model.score(["w0", "w0"], [" w1 w2", " w3"]).tolist()
    return a, b


@pytest.mark.parametrize("loss", ["pairwise", "listwise"])
def test_known_preferences_are_recovered(tiny_policy: Path, tmp_path: Path, loss: str):
    """Three of four people prefer A: the scores end ln 3 apart, the loss at .5623351, the accuracy at .75."""
    settings = config(tmp_path, tiny_policy, [A_WINS, A_WINS, B_WINS, A_WINS], epochs=120, loss=loss)
    figures = reward(settings)
    a, b = scores_of(tmp_path / "run")
    assert a - b == pytest.approx(1.0986123, abs=0.03)
    assert figures["loss"] == pytest.approx(0.5623351, abs=0.002)
    assert figures["accuracy"] == pytest.approx(0.75)
    assert figures["calibration_error"] < 0.01
    assert figures["prompts_on_both_sides"] == 1


def test_swapped_answers_flip_the_sign_and_centring_balances_the_scores(tiny_policy: Path, tmp_path: Path):
    settings = config(tmp_path, tiny_policy, [B_WINS, B_WINS, A_WINS, B_WINS], epochs=120, center_coef=0.1)
    reward(settings)
    a, b = scores_of(tmp_path / "run")
    assert b - a == pytest.approx(1.0986123, abs=0.03)
    assert a + b == pytest.approx(0.0, abs=0.02)


def test_a_margin_pushes_further_apart(tiny_policy: Path, tmp_path: Path):
    rows = [{**A_WINS, "margin": 1.0}, {**A_WINS, "margin": 1.0}, B_WINS, {**A_WINS, "margin": 1.0}]
    reward(config(tmp_path, tiny_policy, rows, epochs=120))
    a, b = scores_of(tmp_path / "run")
    assert a - b > 1.3


def test_a_margin_needs_pairs(tiny_policy: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="set loss to pairwise"):
        reward(config(tmp_path, tiny_policy, [{**A_WINS, "margin": 1.0}], loss="listwise"))


class FixedScores:
    """A reward model that has its scores already."""

    def __init__(self, *scores: float) -> None:
        self.scores = torch.tensor(scores, requires_grad=True)

    def scores_of_rows(self, rows: list[list[int]], microbatch_tokens: int) -> Tensor:
        return self.scores


def ranking(*ranks: int, **fields: Any) -> Ranking:
    return Ranking("w0", ("w1",) * len(ranks), ranks, **fields)


def losses(scores: list[float], rankings: list[list[int]], tmp_path: Path, **settings: Any) -> Tensor:
    given = config(tmp_path, tmp_path, [A_WINS], **settings)
    encoded = [EncodedRanking([[4]] * len(ranks), ranking(*ranks)) for ranks in rankings]
    model: Any = FixedScores(*scores)
    return ranking_losses(model, encoded, given)


@pytest.mark.usefixtures("float64")
def test_losses_by_hand(tmp_path: Path):
    centred = losses([3.0, 1.0], [[1, 2]], tmp_path, center_coef=0.01)
    assert centred.tolist() == pytest.approx([0.2869280110], abs=1e-10)
    both = losses([2.0, 1.0, 0.0, 0.0, 1.0], [[1, 2, 3], [1, 2]], tmp_path)
    assert both.tolist() == pytest.approx([0.2511504620, 1.3132616875], abs=1e-10)
    listed = losses([2.0, 1.0, 0.0, 0.0, 1.0], [[1, 2, 3], [1, 2]], tmp_path, loss="listwise")
    assert listed.tolist() == pytest.approx([0.7208676520 / 2, 1.3132616875], abs=1e-10)
    tied = losses([5.0, 1.0, 0.0], [[1, 2, 2]], tmp_path)  # two pairs: 5 > 1 and 5 > 0
    assert tied.tolist() == pytest.approx([(0.0181499279 + 0.0067153485) / 2], abs=1e-10)


@pytest.mark.usefixtures("float64")
def test_ties_say_nothing_about_each_other():
    scores = torch.tensor([[1.0, 0.5, -2.0, 0.0]], requires_grad=True)
    comparisons = Comparisons.from_rankings(scores[0], [ranking(1, 2, 2, 2)])
    first = scores[0].logsumexp(0) - scores[0, 0]
    assert listwise_losses(comparisons).item() == pytest.approx(first.item(), abs=1e-12)
    gradient = torch.autograd.grad(pairwise_losses(comparisons, bradley_terry_loss).sum(), scores)[0][0]
    expected = [torch.sigmoid(scores[0, j] - 1.0).item() / 3 for j in (1, 2, 3)]
    assert gradient.tolist() == pytest.approx([-sum(expected), *expected], abs=1e-12)


RANKINGS = [
    EncodedRanking([[4, 5], [4, 6, 7, 8], [4]], ranking(1, 2, 2)),
    EncodedRanking([[9, 9, 9], [10]], ranking(1, 2, weight=0.5)),
    EncodedRanking([[11, 0, 2], [12, 13], [14], [15, 16, 17, 18, 19]], ranking(1, 1, 2, 3, weight=2.0)),
]


@pytest.mark.parametrize("loss", ["pairwise", "listwise"])
def test_microbatches_never_change_loss_or_gradient(tiny_policy: Path, tmp_path: Path, loss: str):
    model = RewardModel.load(str(tiny_policy), template="{prompt}{response}")
    model.model.double()
    with torch.no_grad():
        model.model.score.weight.normal_(generator=torch.Generator().manual_seed(1))
    results = []
    for rows, budget in (([0, 1, 2], 100_000), ([2, 0, 1], 1), ([0, 1, 2], 40)):
        settings = config(tmp_path, tiny_policy, [A_WINS], loss=loss, center_coef=0.1, microbatch_tokens=budget)
        task = SupervisedTask(
            name="reward",
            model=model.model,
            lengths=[sum(map(len, encoded.rows)) for encoded in RANKINGS],
            weights=[1, 1, 1],
            row=lambda i: {},
            loss=lambda part, settings=settings: ranking_losses(model, [RANKINGS[i] for i in part], settings).sum(),
            evaluate=dict,
            facts={},
            save=lambda model, folder, figures: None,
        )
        model.model.zero_grad()
        value = accumulate(task, rows, budget, ALONE)
        results.append((value, torch.cat([weight.grad.flatten() for weight in model.model.parameters()])))
    for value, gradient in results[1:]:
        assert value == pytest.approx(results[0][0], abs=1e-10)
        assert torch.allclose(gradient, results[0][1], rtol=0, atol=1e-10)


def many_rankings() -> list[dict[str, Any]]:
    """Answers with w9 in them are better than others; ranked and scored, with ties and unranked ones."""
    rows = []
    for i in range(24):
        good, bad = f" w{i % 8} w9", f" w{i % 8}"
        row: dict[str, Any] = {"prompt": f"w{10 + i % 12}", "responses": [bad, good, bad + " w1", "w2"]}
        rows.append(row | ({"ranks": [2, 1, 2, None]} if i % 2 else {"scores": [0.0, 1.0, 0.0, None]}))
    return rows


@pytest.mark.parametrize("loss", ["pairwise", "listwise"])
def test_rankings_are_learned_and_the_model_is_a_plain_classifier(tiny_gpt2: Path, tmp_path: Path, loss: str):
    settings = config(tmp_path, tiny_gpt2, many_rankings(), epochs=12, loss=loss, center_coef=0.01)
    settings = settings.model_copy(
        update={"data": settings.data.model_copy(update={"eval_path": None, "eval_fraction": 0.25})}
    )
    figures = reward(settings)
    assert figures["accuracy"] > 0.95
    assert json.loads((tmp_path / "run" / "figures.json").read_text()) == figures
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    texts = ["w10 w3 w9", "w11 w3", "w12 w5 w5 w5 w9"]
    with torch.no_grad():
        expected = [plain(**tokenizer(text, return_tensors="pt")).logits[0, 0].item() for text in texts]
    scores = RewardModel.load(str(tmp_path / "run" / "model")).score([""] * 3, texts)
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)


def test_an_encoder_learns_too(tiny_policy: Path, tmp_path: Path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=32, max_position_embeddings=64, **sizes)).save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(tiny_policy).save_pretrained(tmp_path / "bert")
    figures = reward(config(tmp_path, tmp_path / "bert", many_rankings(), epochs=12))
    assert figures["accuracy"] > 0.95


def test_no_prompt_is_on_both_sides(tiny_policy: Path, tmp_path: Path):
    settings = config(tmp_path, tiny_policy, many_rankings())
    settings = settings.model_copy(
        update={"data": settings.data.model_copy(update={"eval_path": None, "eval_fraction": 0.3})}
    )
    split = split_rankings(settings)
    train, held_out, left_out = split.train, split.held_out, split.left_out
    assert {ranking.prompt for ranking in train}.isdisjoint(ranking.prompt for ranking in held_out)
    assert len({ranking.prompt for ranking in held_out}) == 4
    assert (len(train) + len(held_out), left_out) == (24, 0)
    assert all(ranking.ranks == (1, 2, 2) for ranking in train + held_out)


def test_rows_without_a_preference_are_counted(tiny_policy: Path, tmp_path: Path):
    tie = {"prompt": "w0", "responses": ["w1", "w2"], "ranks": [1, 1]}
    settings = config(tmp_path, tiny_policy, [A_WINS, tie, A_WINS])
    split = split_rankings(settings)
    assert (len(split.train), len(split.held_out), split.left_out) == (2, 2, 1)


def test_a_resumed_run_is_the_straight_run(tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = config(tmp_path, tiny_policy, many_rankings(), epochs=2, checkpoint={"every": 3})
    straight = reward(settings)
    cut = settings.model_copy(update={"output": str(tmp_path / "cut")})
    update = supervised.update

    def stops_at_step_9(*arguments: Any) -> dict[str, float]:
        if arguments[1].step == 8:
            raise KeyboardInterrupt
        return update(*arguments)

    monkeypatch.setattr(supervised, "update", stops_at_step_9)
    with pytest.raises(KeyboardInterrupt):
        reward(cut)
    monkeypatch.setattr(supervised, "update", update)
    assert reward(cut, resume=True) == straight
    files = [tmp_path / run / "model" / "model.safetensors" for run in ("run", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_report_by_hand():
    rankings = [Ranking("p", ("good", "bad"), (1, 2)), Ranking("q", ("a", "bb", "ccc"), (1, 2, 2))]
    figures = compute_preference_metrics([[2.0, 0.0], [0.0, 1.0, 0.0]], rankings)
    assert figures["accuracy"] == pytest.approx(0.5 * 1 + 0.25 * 0 + 0.25 * 0.5)
    assert figures["loss"] == pytest.approx(0.5 * 0.1269280110 + 0.25 * 1.3132616875 + 0.25 * log(2))
    assert figures["calibration_error"] == 0.0  # gap^2 = 0.0152, of which noise explains 0.0588


def test_the_length_baseline_learns_its_direction_from_the_training_rankings():
    longer, shorter = Ranking("p", ("long answer", "no"), (1, 2)), Ranking("q", ("no", "long answer"), (1, 2))
    figures = baselines([shorter, shorter, longer], [shorter, shorter, longer])
    assert (figures["length_sign"], figures["length_accuracy"]) == (-1.0, pytest.approx(2 / 3))
    figures = baselines([shorter, shorter, longer], [longer])
    assert (figures["length_sign"], figures["length_accuracy"]) == (1.0, pytest.approx(1 / 3))
    assert figures["constant_accuracy"] == 0.5
    assert baselines([], [longer]) == {}


def test_the_calibration_error_is_debiased():
    """20 pairs at sigma(d) = .75, ten of them right: gap -.25, variance .25 / 19, sqrt(.0625 - .0131579)."""
    differences = np.array([log(3), -log(3)] * 10)
    pairs = Pairs(differences, np.full(20, 0.05), np.arange(20), np.zeros((20, 2), dtype=int))
    assert calibration_error(pairs).root == pytest.approx(0.222131, abs=1e-6)
    together = calibration_error(pairs, np.arange(20) // 2)  # a right and a wrong pair of each prompt: no variance
    assert together.root == pytest.approx(0.25)


@pytest.mark.parametrize(("count", "least"), [(20, 0.6), (100, 0.6), (1000, 0.95)])
def test_a_calibrated_model_passes_a_calibration_gate(count: int, least: float):
    """The plug-in estimate let it pass in 0%, 0% and 95% of the draws."""
    random = np.random.default_rng(1)
    passed, held = [], []
    for _ in range(100):
        sizes = np.abs(random.normal(0, 1.5, count))
        right = random.random(count) < 1 / (1 + np.exp(-sizes))
        rows = np.arange(count)
        pairs = Pairs(np.where(right, sizes, -sizes), np.full(count, 1 / count), rows, np.zeros((count, 2), dtype=int))
        passed.append(calibration_error(pairs).root <= 0.05)
        held.append(calibration_error(pairs).interval[0] == 0.0)
    assert np.mean(passed) >= least
    assert np.mean(held) >= 0.85


def test_a_calibrated_model_has_no_calibration_error():
    """Three of four right at sigma(d) = .75, whichever answer the model prefers."""
    differences = np.array([log(3), log(3), log(3), -log(3)])
    nothing = np.zeros((4, 2), dtype=int)
    pairs = Pairs(differences, np.full(4, 0.25), nothing[:, 0], nothing)
    assert calibration_error(pairs).root == pytest.approx(0.0, abs=1e-12)
    assert calibration_error(pairs.scale(-1.0)).root == pytest.approx(0.5, abs=1e-12)
