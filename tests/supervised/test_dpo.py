"""Direct preference optimisation: known preferences are recovered, nothing but the data changes the result."""

import json
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from keel.cli import dpo as verb
from keel.config import DpoConfig, parse
from keel.data.notes import Notes
from keel.data.preferences import Ranking
from keel.errors import ConfigError, DataError
from keel.models.loading import load_tokenizer
from keel.run.folder import RunFolder
from keel.supervised import loop as supervised
from keel.supervised.dpo import dpo, dpo_task, encode_side
from keel.supervised.loop import accumulate
from keel.supervised.reference_logprobs import load_or_compute_reference
from keel.supervised.response_logprobs import response_logprobs
from keel.supervised.sft import load_speaker
from keel.supervised.split import split_rankings
from keel.world import ALONE

from ..runs import lines

A_WINS = {"prompt": "w0", "chosen": " w1 w2", "rejected": " w3"}
B_WINS = {"prompt": "w0", "chosen": " w3", "rejected": " w1 w2"}
LEARN = {"optim": {"learning_rate": 3e-3, "schedule": "linear"}}


def config(tmp_path: Path, model: Path, rows: list[dict[str, Any]], **settings: Any) -> DpoConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(path), "eval_path": str(path)}
    given = {"output": str(tmp_path / "run"), "model": str(model), "data": data, "batch_size": 4, **LEARN}
    return parse(DpoConfig, {**given, **settings})


def logratio(start: Path, run: Path, prompt: str, answer: str) -> float:
    """log pi(answer) - log pi_ref(answer), of plain transformers models."""
    tokenizer = AutoTokenizer.from_pretrained(start)
    before, tokens = tokenizer(prompt).input_ids, torch.tensor([[*tokenizer(prompt + answer).input_ids, 2]])

    def logprob(folder: Path) -> float:
        with torch.no_grad():
            law = AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits[0].log_softmax(-1)
        answered = tokens[0, len(before) :, None]
        return float(law[len(before) - 1 : -1].gather(1, answered).sum())

    return logprob(run / "policy") - logprob(start)


@pytest.mark.parametrize(("loss", "margin"), [("sigmoid", log(3)), ("listwise", log(3)), ("ipo", 0.25)])
def test_known_preferences_are_recovered(tiny_policy: Path, tmp_path: Path, loss: str, margin: float):
    """Three of four people prefer A: implicit rewards end ln 3 apart; with IPO (3/4 - 1/2), whatever beta is."""
    rows = [A_WINS, A_WINS, B_WINS, A_WINS]
    figures = dpo(config(tmp_path, tiny_policy, rows, epochs=100, loss=loss, beta=0.5))
    a, b = (0.5 * logratio(tiny_policy, tmp_path / "run", "w0", answer) for answer in (" w1 w2", " w3"))
    assert a - b == pytest.approx(margin, abs=0.02)
    assert figures["accuracy"] == pytest.approx(0.75)
    assert figures["margin"] == pytest.approx((a - b) / 2, abs=0.01)  # three times that way round, once the other
    assert figures["chosen_reward"] == pytest.approx(0.75 * a + 0.25 * b, abs=1e-3)
    if loss != "ipo":
        assert figures["loss"] == pytest.approx(0.5623351, abs=0.002)


def test_weights_count_as_rows_and_smoothed_labels_as_rows_the_other_way_round(tiny_policy: Path, tmp_path: Path):
    figures = {}
    for name, rows, settings in (
        ("rows", [A_WINS, A_WINS, B_WINS, A_WINS], {}),
        ("weights", [{**A_WINS, "weight": 3.0}, {**B_WINS, "weight": 1.0}], {"batch_size": 2}),
        ("smoothed", [A_WINS], {"batch_size": 1, "label_smoothing": 0.25}),
    ):
        (tmp_path / name).mkdir()
        dpo(config(tmp_path / name, tiny_policy, rows, epochs=100, beta=0.5, **settings))
        run = tmp_path / name / "run"
        figures[name] = 0.5 * (logratio(tiny_policy, run, "w0", " w1 w2") - logratio(tiny_policy, run, "w0", " w3"))
    assert figures == pytest.approx(dict.fromkeys(figures, log(3)), abs=0.02)


def test_a_tie_is_half_a_win_for_each(tiny_policy: Path, tmp_path: Path):
    tie = {"prompt": "w0", "responses": [" w1 w2", " w3"], "ranks": [1, 1]}
    dpo(config(tmp_path, tiny_policy, [A_WINS, tie, A_WINS, tie], epochs=100, beta=0.5, ties="half"))
    a, b = (0.5 * logratio(tiny_policy, tmp_path / "run", "w0", answer) for answer in (" w1 w2", " w3"))
    assert a - b == pytest.approx(log(3), abs=0.02)  # A wins two and two halves of four


def test_a_margin_pushes_further_apart(tiny_policy: Path, tmp_path: Path):
    rows = [{**row, "margin": 0.5} for row in (A_WINS, A_WINS, A_WINS)] + [B_WINS]
    figures = dpo(config(tmp_path, tiny_policy, rows, epochs=100, beta=0.5))
    assert 2 * figures["margin"] > log(3) + 0.25


@pytest.mark.parametrize("loss", ["ipo", "listwise", "orpo"])
def test_a_margin_needs_a_loss_that_has_a_place_for_it(tiny_policy: Path, tmp_path: Path, loss: str):
    with pytest.raises(ConfigError, match="set loss to sigmoid or simpo"):
        dpo(config(tmp_path, tiny_policy, [{**A_WINS, "margin": 1.0}], loss=loss))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing needs loss: sigmoid or simpo; remove it for ipo"),
        ({"loss": "orpo", "target_margin": 0.1}, "target_margin needs loss: sigmoid or simpo; remove it for orpo"),
        (
            {"loss": "simpo", "length_normalized": True},
            "simpo always divides by the length .* remove length_normalized",
        ),
        ({"loss": "orpo", "nll_coef": 1.0}, "orpo has the term of nll_coef with weight 1; remove nll_coef"),
        ({"loss": "listwise", "ties": "half"}, "ties: half needs pairs"),
        ({"label_smoothing": 0.5}, "less than 0.5"),
        ({"beta": 0}, "beta: Input should be greater than 0, got 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, tmp_path, [A_WINS], **settings)


def many_rankings() -> list[dict[str, Any]]:
    """Answers with w9 in them are better than others; with ties and unranked ones."""
    rows = []
    for i in range(24):
        good, bad = f" w{i % 8} w9", f" w{i % 8}"
        row: dict[str, Any] = {"prompt": f"w{10 + i % 12}", "responses": [bad, good, bad + " w1", " w2"]}
        rows.append(row | ({"ranks": [2, 1, 2, None]} if i % 2 else {"scores": [0.0, 1.0, 0.0, None]}))
    return rows


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_rankings_are_learned_and_the_result_is_a_plain_policy(tiny_gpt2: Path, tmp_path: Path, lora: Any):
    data = {"path": str(tmp_path / "rows.jsonl"), "eval_fraction": 0.25}
    rate = {"learning_rate": 2e-2 if lora else 2e-3}
    figures = dpo(config(tmp_path, tiny_gpt2, many_rankings(), data=data, epochs=10, lora=lora, optim=rate))
    assert figures["accuracy"] > 0.95
    assert figures["accuracy_low"] <= figures["accuracy"] <= figures["accuracy_high"]
    assert (figures["length_sign"], figures["rankings_left_out"], figures["prompts_on_both_sides"]) == (1.0, 0, 0)
    assert json.loads((tmp_path / "run" / "figures.json").read_text()) == figures
    assert sorted(path.name for path in (tmp_path / "run" / "policy").iterdir()) == [
        *(["adapter"] if lora else []),
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    held_out = lines(tmp_path / "run" / "held_out.jsonl")
    for row in held_out:
        for answer, reward in zip(row["responses"], row["scores"], strict=True):
            found = 0.1 * logratio(tiny_gpt2, tmp_path / "run", row["prompt"], answer)
            assert found == pytest.approx(reward, abs=1e-4)


def test_the_figures_of_the_start_are_exact_and_the_metrics_bear_the_names_of_the_stage(
    tiny_policy: Path, tmp_path: Path
):
    dpo(config(tmp_path, tiny_policy, many_rankings(), epochs=1, microbatch_tokens=40))
    first, *_, last = lines(tmp_path / "run" / "metrics.jsonl")
    start = {name.removeprefix("dpo/eval_"): value for name, value in first.items() if "eval_" in name}
    assert start["loss"] == pytest.approx(log(2), abs=1e-6)
    assert (start["accuracy"], start["margin"], start["forward_kl"]) == (0.5, 0.0, 0.0)
    assert (start["chosen_reward"], start["rejected_reward"]) == (0.0, 0.0)
    # the log-probability of a chosen answer moves by its reward / beta
    moved = last["dpo/eval_chosen_logprob"] - start["chosen_logprob"]
    assert moved == pytest.approx(last["dpo/eval_chosen_reward"] / 0.1, abs=1e-4)
    assert last["dpo/loss"] < log(2)


def task_in_double(settings: DpoConfig, folder: RunFolder) -> Any:
    """What `fit` gets, with float64 weights, once the reference is known."""
    split = split_rankings(settings)
    model, tokenizer, ends = load_speaker(settings, ALONE)
    model.double()
    sides = {
        name: encode_side(getattr(split, name), tokenizer, ends, 64, Notes())
        for name in ("train", "watched", "held_out")
    }
    task = dpo_task(settings, model, tokenizer, split, sides, ALONE)
    task.prepare(folder)
    with torch.no_grad():  # away from the start
        for number, weight in enumerate(model.parameters()):
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
    return task


def gradient_of(settings: DpoConfig, rows: list[int], tmp_path: Path) -> tuple[float, Tensor]:
    task = task_in_double(settings, RunFolder(tmp_path / "none"))
    value = accumulate(task, rows, settings.microbatch_tokens, ALONE)
    return value, torch.cat([weight.grad.flatten() for weight in task.model.parameters()])


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "listwise", "simpo", "orpo"])
def test_microbatches_and_orders_never_change_loss_or_gradient(tiny_policy: Path, tmp_path: Path, loss: str):
    rankings = many_rankings()[:5]
    turned = [
        {"prompt": row["prompt"], "responses": row["responses"][::-1]}
        | {name: row[name][::-1] for name in ("ranks", "scores") if name in row}
        for row in rankings
    ]
    first: tuple[float, Tensor] | None = None
    for data, rows, budget in (
        (rankings, [0, 1, 2, 3, 4], 100_000),
        (rankings, [3, 0, 4, 2, 1], 1),
        (rankings, [0, 1, 2, 3, 4], 25),
        (turned, [0, 1, 2, 3, 4], 60),
    ):
        found = gradient_of(config(tmp_path, tiny_policy, data, loss=loss, microbatch_tokens=budget), rows, tmp_path)
        first = first or found
        assert found[0] == pytest.approx(first[0], abs=1e-10)
        torch.testing.assert_close(found[1], first[1], rtol=0, atol=1e-9)


def mean_logprob(policy: Path, answer: str) -> float:
    """Of the tokens of the answer to w0, of plain transformers models."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokens = torch.tensor([[*tokenizer("w0" + answer).input_ids, 2]])
    with torch.no_grad():
        law = AutoModelForCausalLM.from_pretrained(policy).eval()(tokens).logits[0].log_softmax(-1)
    return float(law[:-1].gather(1, tokens[0, 1:, None]).mean())


def test_simpo_recovers_known_preferences_without_a_reference(tiny_policy: Path, tmp_path: Path):
    """Three of four people prefer A: beta times the difference of the mean log-probs ends at ln 3 + the margin's share.
    Without a margin it is ln 3."""
    rows = [A_WINS, A_WINS, B_WINS, A_WINS]
    figures = dpo(config(tmp_path, tiny_policy, rows, epochs=100, loss="simpo", beta=2.0))
    a, b = (2.0 * mean_logprob(tmp_path / "run" / "policy", answer) for answer in (" w1 w2", " w3"))
    assert a - b == pytest.approx(log(3), abs=0.02)
    assert figures["loss"] == pytest.approx(0.5623351, abs=0.002)
    assert "forward_kl" not in figures
    assert not (tmp_path / "run" / "reference.safetensors").exists()


def test_length_normalized_dpo_recovers_the_reward_of_a_token(tiny_policy: Path, tmp_path: Path):
    rows = [A_WINS, A_WINS, B_WINS, A_WINS]
    dpo(config(tmp_path, tiny_policy, rows, epochs=100, beta=2.0, length_normalized=True))
    a, b = (
        2.0 * logratio(tiny_policy, tmp_path / "run", "w0", answer) / tokens
        for answer, tokens in ((" w1 w2", 3), (" w3", 2))
    )
    assert a - b == pytest.approx(log(3), abs=0.02)


@pytest.mark.parametrize("settings", [{"nll_coef": 1.0}, {"loss": "orpo"}])
def test_the_nll_term_keeps_chosen_responses_likely(tiny_policy: Path, tmp_path: Path, settings: dict[str, Any]):
    figures = {}
    for name, given in (("without", {}), ("with", settings)):
        (tmp_path / name).mkdir()
        figures[name] = dpo(config(tmp_path / name, tiny_policy, [A_WINS] * 4, epochs=30, **given))
    assert figures["with"]["accuracy"] == 1.0
    assert figures["with"]["chosen_logprob"] > figures["without"]["chosen_logprob"] + 0.1
    assert (tmp_path / "with" / "run" / "reference.safetensors").exists() == ("loss" not in settings)


def test_a_resumed_run_is_the_straight_run(tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With the reference read back, and with a reference that was damaged meanwhile."""
    data = {"path": str(tmp_path / "rows.jsonl"), "eval_fraction": 0.2, "watch_fraction": 0.3}
    settings = config(tmp_path, tiny_policy, many_rankings(), data=data, epochs=2, patience=9, checkpoint={"every": 2})
    straight = dpo(settings)
    update = supervised.update

    def stops_at_step_5(*arguments: Any) -> dict[str, float]:
        if arguments[1].step == 4:
            raise KeyboardInterrupt
        return update(*arguments)

    for name in ("cut", "damaged"):
        cut = settings.model_copy(update={"output": str(tmp_path / name)})
        monkeypatch.setattr(supervised, "update", stops_at_step_5)
        with pytest.raises(KeyboardInterrupt):
            dpo(cut)
        monkeypatch.setattr(supervised, "update", update)
        reference = tmp_path / name / "reference.safetensors"
        whole = reference.read_bytes()
        if name == "damaged":
            reference.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert dpo(cut, resume=True) == straight
        assert reference.read_bytes() == whole
        files = [tmp_path / run / "policy" / "model.safetensors" for run in ("run", name)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_the_reference_is_asked_once_and_kept(tmp_path: Path):
    asked: list[int] = []

    def ask() -> dict[str, Tensor]:
        asked.append(1)
        return {"train": torch.tensor([-1.5, -2.0]), "held_out": torch.zeros(0)}

    folder = RunFolder(tmp_path)
    load_or_compute_reference(folder, ask, ALONE)
    load_or_compute_reference(
        folder, ask, ALONE
    )  # the first start came to nothing: other data may have been given since
    assert len(asked) == 2
    folder.metrics.write_text("a run\n")
    assert load_or_compute_reference(folder, ask, ALONE)["train"].tolist() == [-1.5, -2.0]
    assert len(asked) == 2
    assert load_file(tmp_path / "reference.safetensors").keys() == {"train", "held_out"}


CHAT = "{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}a{% endif %}"


def test_chats_are_read_through_the_template(tiny_policy: Path, tmp_path: Path):
    tokenizer = load_tokenizer(str(tiny_policy))
    tokenizer.chat_template = CHAT
    chat = [{"role": "user", "content": "w5 w6"}]
    side = encode_side([Ranking(chat, ("w1 w2", "w3"), (1, 2))], tokenizer, [2], 64, Notes())
    first, second = side.responses[0]
    assert [tokenizer.decode(answer.tokens) for answer in (first, second)] == [
        "<unk> w5 w6 <unk> w1 w2 </s>",
        "<unk> w5 w6 <unk> w3 </s>",
    ]
    assert (first.num_prompt_tokens, first.num_targets, second.num_targets) == (4, 3, 2)


def test_a_long_prompt_loses_its_beginning_for_all_answers_alike(tiny_policy: Path):
    tokenizer = load_tokenizer(str(tiny_policy))
    ranking = Ranking("w1 w2 w3 w4", (" w5", " w6 w7 w8"), (1, 2))
    side = encode_side([ranking], tokenizer, [2], 6, Notes())
    assert [tokenizer.decode(answer.tokens) for answer in side.responses[0]] == ["w3 w4 w5 </s>", "w3 w4 w6 w7 w8 </s>"]
    assert [answer.num_prompt_tokens for answer in side.responses[0]] == [2, 2]


def test_what_starts_every_text_stays_when_a_prompt_is_cut(tiny_policy: Path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(str(tiny_policy))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    side = encode_side([Ranking("w1 w2 w3 w4", (" w5", " w6"), (1, 2))], tokenizer, [2], 5, Notes())
    assert [tokenizer.decode(answer.tokens) for answer in side.responses[0]] == [
        "<s> w3 w4 w5 </s>",
        "<s> w3 w4 w6 </s>",
    ]


def test_an_answer_is_never_cut(tiny_policy: Path, tmp_path: Path):
    rows = [A_WINS, {**A_WINS, "chosen": " w1" * 20}, A_WINS]
    with pytest.raises(DataError, match=r"1 rankings have responses that leave no room .* 16 tokens") as caught:
        dpo(config(tmp_path, tiny_policy, rows, max_tokens=16))
    assert caught.value.where.endswith(":2")


def test_no_answers_have_no_log_probabilities(tiny_policy: Path, tmp_path: Path):
    model = load_speaker(config(tmp_path, tiny_policy, [A_WINS]), ALONE)[0]
    assert response_logprobs(model, [], 100).shape == (0,)


def test_without_held_out_rows_the_policy_is_made_all_the_same(tiny_policy: Path, tmp_path: Path):
    data = {"path": str(tmp_path / "rows.jsonl"), "eval_fraction": 0}
    figures = dpo(config(tmp_path, tiny_policy, many_rankings(), data=data))
    assert figures == {"rankings_left_out": 0, "prompts_on_both_sides": 0, "rows_cut": 0}
    assert not (tmp_path / "run" / "held_out.jsonl").exists()


def test_patience_keeps_the_best_weights(tiny_policy: Path, tmp_path: Path):
    """What is learned from says the opposite of what is watched: the first weights are the best."""
    rows = [{"prompt": f"w{i}", "chosen": " w1", "rejected": " w2"} for i in range(10)]
    data = {"path": str(tmp_path / "rows.jsonl"), "eval_fraction": 0.2, "watch_fraction": 0.25}
    settings = config(tmp_path, tiny_policy, rows, data=data, epochs=50, patience=2)
    watched = {ranking.prompt for ranking in split_rankings(settings).watched}
    turned = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if row["prompt"] in watched else row
        for row in rows
    ]
    figures = dpo(config(tmp_path, tiny_policy, turned, data=data, epochs=50, patience=2))
    assert figures["best_step"] == 0
    assert figures["margin"] == pytest.approx(0.0, abs=1e-6)
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 4  # the start, and three steps that end two passes


def test_the_table_says_when_chosen_answers_became_less_likely(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    figures = {"accuracy": 0.75, "accuracy_low": 0.7, "accuracy_high": 0.8, "loss": 0.6, "margin": 0.4}
    figures |= {"chosen_reward": -0.3, "rejected_reward": -0.7, "chosen_logprob": -14.0, "forward_kl": 5.0}
    figures |= {"length_sign": 1.0, "length_accuracy": 0.52, "prompts_on_both_sides": 2}
    verb.print_dpo_metrics(figures, config(tmp_path, tmp_path, [A_WINS]))
    shown = capsys.readouterr().out
    assert "chosen responses became less likely, by 3 nats each (initial log-probability -11)" in shown
    assert all(text in shown for text in ("0.75 [0.7, 0.8]", "longer is better", "2 held-out prompts are also"))
    verb.print_dpo_metrics(figures | {"chosen_reward": 0.1}, config(tmp_path, tmp_path, [A_WINS]))
    assert "less likely" not in capsys.readouterr().out
    verb.print_dpo_metrics(figures, config(tmp_path, tmp_path, [A_WINS], loss="simpo"))  # no reference to compare with
    assert "less likely" not in capsys.readouterr().out
