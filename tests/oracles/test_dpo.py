"""DPO against what is known in closed form: its optimum on T3, its loss and gradient at the start."""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from keel.cli.main import main
from keel.config import DpoConfig, parse
from keel.data.notes import Notes
from keel.data.preferences import Ranking
from keel.supervised.dpo import DpoSplit, encode_side
from keel.supervised.dpo_losses import response_rewards, total_losses
from keel.supervised.response_logprobs import count_response_tokens, response_logprobs
from keel.supervised.sft import load_speaker
from keel.world import ALONE

from . import t3, t3_model
from .tabular import KL_COEF, SCORES, optimal_answer_logprobs

BEST = t3.OPTIMUM[KL_COEF][0]


def pairs() -> Iterator[dict[str, Any]]:
    """Every two answers in either order, weighted by how often the Bradley-Terry model of T3's score says so."""
    for chosen, rejected in itertools.permutations(t3.ANSWERS, 2):
        often = 1 / (1 + math.exp(t3.score(rejected) - t3.score(chosen)))
        texts = {"chosen": t3_model.text(chosen), "rejected": t3_model.text(rejected)}
        yield {"prompt": "a", **texts, "weight": often}


def rankings() -> Iterator[dict[str, Any]]:
    """Every order of 15 threes, weighted by the Plackett-Luce model of T3's score."""
    for first in range(15):
        for order in itertools.permutations(t3.ANSWERS[(first + k) % 15] for k in (0, 1, 5)):
            worth = [math.exp(t3.score(answer)) for answer in order]
            often = worth[0] / sum(worth) * worth[1] / (worth[1] + worth[2])
            yield {
                "prompt": "a",
                "responses": [t3_model.text(answer) for answer in order],
                "ranks": [1, 2, 3],
                "weight": often,
            }


def test_t3_as_a_model_is_t3(tmp_path: Path) -> None:
    found = t3_model.answer_logprobs(t3_model.save_t3_model(tmp_path / "t3"))
    assert found.tolist() == pytest.approx([t3.logprob(answer) for answer in t3.ANSWERS], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "rows"), [("sigmoid", pairs), pytest.param("listwise", rankings, marks=pytest.mark.exhaustive)]
)
def test_the_optimum_of_the_regularised_objective_is_found(loss: str, rows: Any, tmp_path: Path) -> None:
    """By `keel dpo` itself, with beta for kl_coef: the same law that PPO and A2C are held to."""
    start = t3_model.save_t3_model(tmp_path / "t3")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    given = {"output": tmp_path / "run", "model": start, "data.path": data, "data.eval-fraction": 0, "loss": loss}
    learn = {"epochs": 300, "optim.learning-rate": 4e-3, "optim.max-grad-norm": 100}
    settings = {**given, "beta": KL_COEF, **learn, "batch-size": len(list(rows()))}
    assert main(["dpo", *(text for name, value in settings.items() for text in (f"--{name}", str(value)))]) == 0
    found = t3_model.answer_logprobs(tmp_path / "run" / "policy")
    reference = torch.tensor([t3.logprob(answer) for answer in t3.ANSWERS], dtype=torch.float64)
    objective = float((found.exp() * (SCORES - KL_COEF * (found - reference))).sum())
    assert 0.5 * (found.exp() - optimal_answer_logprobs().exp()).abs().sum() < 0.02
    assert objective == pytest.approx(BEST, abs=0.002)
    assert objective <= BEST


RANKINGS = [
    Ranking("w5", (" w1 w2", " w3", " w4 w4 w4"), (1, 2, 3)),
    Ranking("w6 w7 w8", (" w1", " w2"), (2, 1), weight=0.5),
    Ranking("w9", (" w1", " w2 w3", "", " w4"), (1, 2, 2, 3), weight=1.5),
]


class Prepared:
    """A model in float64, rankings as it reads them, and its own log-probs as the reference."""

    def __init__(self, model: Path, output: Path, **settings: Any) -> None:
        given = {"output": str(output), "model": str(model), "data": {"path": "given"}}
        self.config = parse(DpoConfig, {**given, **settings})
        self.model, self.tokenizer, self.ends = load_speaker(self.config, ALONE)
        self.model.double()
        self.side: DpoSplit = encode_side(RANKINGS, self.tokenizer, self.ends, 64, Notes())
        with torch.no_grad():
            self.reference = self.logprobs().clone()

    def logprobs(self, budget: int = 10_000) -> Tensor:
        return response_logprobs(self.model, self.side.all_responses, budget)

    def loss(self) -> Tensor:
        """Summed over the rankings."""
        return self.losses().sum()

    def losses(self) -> Tensor:
        logprobs, lengths = self.logprobs(), count_response_tokens(self.side.all_responses)
        rewards = response_rewards(logprobs, lengths, self.reference, self.config)
        return total_losses(logprobs, lengths, rewards, RANKINGS, self.config)


@pytest.mark.parametrize(
    ("settings", "losses"),
    [
        ({}, [math.log(2), math.log(2) / 2, 1.5 * math.log(2)]),
        ({"label_smoothing": 0.1}, [math.log(2), math.log(2) / 2, 1.5 * math.log(2)]),
        ({"ties": "half"}, [math.log(2), math.log(2) / 2, 1.5 * math.log(2)]),
        ({"length_normalized": True, "beta": 5.0}, [math.log(2), math.log(2) / 2, 1.5 * math.log(2)]),
        ({"target_margin": 1.0}, [math.log1p(math.e) * share for share in (1, 0.5, 1.5)]),
        ({"loss": "ipo", "beta": 0.25}, [4.0, 2.0, 6.0]),  # (1 / (2 beta))^2
        # log 3! of all orders, per answer before others; a tie is all of its orders: one of 4 first, two of 3 next
        ({"loss": "listwise"}, [math.log(6) / 2, math.log(2) / 2, 1.5 * math.log(12) / 3]),
    ],
)
def test_before_the_first_step_all_answers_are_worth_the_same(
    settings: dict[str, Any], losses: list[float], tiny_policy: Path, tmp_path: Path
) -> None:
    prepared = Prepared(tiny_policy, tmp_path, **settings)
    assert prepared.losses().tolist() == pytest.approx(losses, abs=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.3, "label_smoothing": 0.2, "ties": "half"},
        {"loss": "ipo"},
        {"loss": "listwise", "beta": 2.0},
        {"beta": 2.0, "length_normalized": True, "nll_coef": 0.5},
        {"loss": "simpo", "beta": 2.0, "target_margin": 0.5},
        {"loss": "orpo", "beta": 0.5},
    ],
)
def test_the_gradient_is_that_of_finite_differences(settings: dict[str, Any], tiny_gpt2: Path, tmp_path: Path) -> None:
    """Along five random directions, away from the start, where the loss has no symmetry left."""
    prepared = Prepared(tiny_gpt2, tmp_path, **settings)
    parameters = [weight for weight in prepared.model.parameters() if weight.requires_grad]
    generator = torch.Generator().manual_seed(0)

    def move(direction: list[Tensor], by: float) -> None:
        with torch.no_grad():
            for weight, step in zip(parameters, direction, strict=True):
                weight += by * step

    directions = [
        [torch.randn(weight.shape, generator=generator, dtype=weight.dtype) for weight in parameters] for _ in range(5)
    ]
    move(directions[0], 0.01)
    gradients = torch.autograd.grad(prepared.loss(), parameters)
    for direction in directions:
        slope = sum(float((g * step).sum()) for g, step in zip(gradients, direction, strict=True))
        move(direction, 1e-6)
        above = prepared.loss().item()
        move(direction, -2e-6)
        below = prepared.loss().item()
        move(direction, 1e-6)
        assert (above - below) / 2e-6 == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_an_answer_is_worth_what_plain_transformers_says_of_it_alone(tiny_gpt2: Path, tmp_path: Path) -> None:
    """The sum over its own tokens and the end token, whatever it is read together with."""
    prepared = Prepared(tiny_gpt2, tmp_path)
    for budget in (1, 20, 10_000):
        for found, answer in zip(prepared.logprobs(budget), prepared.side.all_responses, strict=True):
            tokens = torch.tensor([answer.tokens])
            assert tokens[0, -1] == 2  # the end token counts
            law = prepared.model(input_ids=tokens).logits[0, answer.num_prompt_tokens - 1 : -1].log_softmax(-1)
            expected = law.gather(1, tokens[0, answer.num_prompt_tokens :, None]).sum()
            assert found.item() == pytest.approx(expected.item(), abs=1e-10)
