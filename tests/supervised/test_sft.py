"""Supervised fine-tuning: what is learned, that splitting a step changes nothing, that a resumed run is the same."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from keel.config import SftConfig, parse
from keel.data.examples import Example
from keel.errors import ConfigError, DataError
from keel.models.loading import load_causal_lm
from keel.supervised import loop as supervised
from keel.supervised.loop import SupervisedTask, accumulate, rows_of_step
from keel.supervised.sft import evaluate_examples, sft, target_losses
from keel.world import ALONE

EXAMPLES = [
    Example("a", (4, 5, 6, 7, 2), 2),
    Example("b", (8, 9, 2), 1),
    Example("c", (1, 10, 11, 12, 13, 14, 2), 0),
    Example("d", (4, 5, 6, 15, 2, 0, 2), 4),
]


def config(tmp_path: Path, model: Path, **settings: Any) -> SftConfig:
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{(7 * i) % 20}" * (1 + i % 3)} for i in range(20)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"output": str(tmp_path / "run"), "model": str(model), "data": {"path": str(path)}, "batch_size": 6}
    return parse(SftConfig, {**given, "optim": {"learning_rate": 0.01}, **settings})


def metrics_of(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.endswith("tokens_per_second")} for row in rows]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(run / "model").state_dict()


def test_the_loss_is_on_what_follows_the_prompt(tiny_policy: Path):
    model = load_causal_lm(str(tiny_policy))
    with torch.no_grad():
        together = target_losses(model, EXAMPLES).tolist()
        alone = []
        for example in EXAMPLES:
            logprobs = model(input_ids=torch.tensor([example.tokens])).logits[0].log_softmax(-1)
            first = max(1, example.num_prompt_tokens)
            alone += [-logprobs[t - 1, example.tokens[t]].item() for t in range(first, len(example.tokens))]
    assert len(together) == sum(example.num_targets for example in EXAMPLES) == 3 + 2 + 6 + 3
    assert together == pytest.approx(alone, abs=1e-5)


def test_chunks_of_logits_never_change_loss_or_gradient(tiny_policy: Path, monkeypatch: pytest.MonkeyPatch):
    model = load_causal_lm(str(tiny_policy)).double()
    results = []
    for at_once in (2**25, 32 * 3):
        monkeypatch.setattr("keel.models.heads.LOGITS_AT_ONCE", {"cpu": at_once})
        monkeypatch.setattr("keel.models.heads.LOGITS_KEPT", at_once)
        model.zero_grad()
        losses = target_losses(model, EXAMPLES)
        losses.sum().backward()
        results.append((losses.detach(), torch.cat([weight.grad.flatten() for weight in model.parameters()])))
    assert torch.allclose(results[0][0], results[1][0], rtol=0, atol=1e-12)
    assert torch.allclose(results[0][1], results[1][1], rtol=0, atol=1e-12)


def test_the_prompt_gets_no_gradient_as_a_target(tiny_policy: Path):
    """What the model would say after w0 is pushed only where w1 is a completion, not where it is a prompt."""
    model = load_causal_lm(str(tiny_policy))
    hidden_of = {}
    for name, start in (("prompt", 2), ("completion", 1)):
        model.zero_grad()
        target_losses(model, [Example("p", (4, 5, 2), start)]).sum().backward()
        hidden_of[name] = model.lm_head.weight.grad.clone()
    assert hidden_of["prompt"].abs().sum() > 0
    assert not torch.allclose(hidden_of["prompt"], hidden_of["completion"])
    assert target_losses(model, [Example("p", (4, 5, 2), 2)]).shape == (1,)


def test_microbatches_never_change_loss_or_gradient(tiny_policy: Path):
    model = load_causal_lm(str(tiny_policy)).double()
    task = SupervisedTask(
        name="sft",
        model=model,
        lengths=[len(example.tokens) for example in EXAMPLES],
        weights=[example.num_targets for example in EXAMPLES],
        row=lambda i: {},
        loss=lambda rows: target_losses(model, [EXAMPLES[i] for i in rows]).sum(),
        evaluate=dict,
        facts={},
        save=lambda model, folder, figures: None,
    )
    results = []
    for rows, budget in (([0, 1, 2, 3], 1000), ([3, 1, 0, 2], 1), ([0, 1, 2, 3], 8)):
        model.zero_grad()
        loss = accumulate(task, rows, budget, ALONE)
        results.append((loss, torch.cat([weight.grad.flatten() for weight in model.parameters()])))
    whole, expected = results[0]
    assert whole == pytest.approx(target_losses(model, EXAMPLES).mean().item(), abs=1e-12)
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(whole, abs=1e-10)
        assert torch.allclose(gradient, expected, rtol=0, atol=1e-10)


def test_the_held_out_loss_does_not_depend_on_batching(tiny_policy: Path):
    model = load_causal_lm(str(tiny_policy))
    figures = [evaluate_examples(model, EXAMPLES, budget, ALONE) for budget in (1, 14, 1000)]
    assert (
        figures[0]["loss"] == pytest.approx(figures[1]["loss"], abs=1e-6) == pytest.approx(figures[2]["loss"], abs=1e-6)
    )
    assert figures[0]["perplexity"] == pytest.approx(math.exp(figures[0]["loss"]))
    assert evaluate_examples(model, [], 100, ALONE) == {}


def test_every_pass_shows_every_row_once(tiny_policy: Path, tmp_path: Path):
    settings = config(tmp_path, tiny_policy, epochs=2.5, batch_size=8)
    rows = [row for step in range(7) for row in rows_of_step(settings, 20, step)]
    assert supervised.num_steps(settings, 20) == 7
    assert len(rows) == 50
    assert sorted(rows[:20]) == sorted(rows[20:40]) == list(range(20))
    assert rows[:20] != rows[20:40]


@pytest.mark.parametrize("num_rows", [1, 7, 11, 20])
@pytest.mark.parametrize("epochs", [0.01, 0.3, 0.5, 0.99, 1.01, 1.3, 2.5])
def test_no_step_of_a_broken_pass_is_empty(epochs: float, num_rows: int, tiny_policy: Path, tmp_path: Path):
    for batch_size in (1, 2, 3, 10):
        settings = config(tmp_path, tiny_policy, epochs=epochs, batch_size=batch_size)
        steps = range(supervised.num_steps(settings, num_rows))
        taken = [len(rows_of_step(settings, num_rows, step)) for step in steps]
        assert min(taken) > 0
        assert sum(taken) == max(1, round(epochs * num_rows))


def test_a_finished_run_may_leave_its_result_alone(tiny_policy: Path, tmp_path: Path):
    sft(config(tmp_path, tiny_policy, checkpoint={"keep_final": False}))
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert "model" in names
    assert "checkpoints" not in names
    with pytest.raises(ConfigError, match="has no checkpoints"):
        sft(config(tmp_path, tiny_policy, epochs=2, checkpoint={"keep_final": False}), resume=True)


@pytest.mark.parametrize("fixture", ["tiny_policy", "tiny_gpt2"])
def test_it_learns_and_saves_a_plain_model(request: pytest.FixtureRequest, tmp_path: Path, fixture: str):
    settings = config(tmp_path, request.getfixturevalue(fixture), epochs=25)
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"eval_path": settings.data.path})})
    figures = sft(settings)
    lines = metrics_of(tmp_path / "run")
    assert lines[0]["step"] == 0
    assert figures["loss"] == lines[-1]["sft/eval_loss"] < 0.3 * lines[0]["sft/eval_loss"]
    assert json.loads((tmp_path / "run" / "figures.json").read_text()) == figures
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    with torch.no_grad():
        loss = target_losses(model, [Example("", (4, 5, 4, 2), 2)]).mean()  # w0 w1 -> w0 </s>, a row of the data
    assert loss < 1.0


@pytest.mark.parametrize("stop", [1, 6])
def test_a_resumed_run_is_the_straight_run(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
):
    settings = config(tmp_path, tiny_policy, epochs=3, checkpoint={"every": 2})
    straight = sft(settings)
    cut = settings.model_copy(update={"output": str(tmp_path / "cut")})
    update = supervised.update

    def stops(*arguments: Any) -> dict[str, float]:
        if arguments[1].step == stop:
            raise KeyboardInterrupt
        return update(*arguments)

    monkeypatch.setattr(supervised, "update", stops)
    with pytest.raises(KeyboardInterrupt):
        sft(cut)
    assert len(metrics_of(tmp_path / "cut")) == stop + 1
    monkeypatch.setattr(supervised, "update", update)
    assert sft(cut, resume=True) == straight
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "run")
    one, other = weights_of(tmp_path / "run"), weights_of(tmp_path / "cut")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert sft(cut, resume=True) == straight  # a finished run stays as it is


def test_a_run_is_not_overwritten(tiny_policy: Path, tmp_path: Path):
    settings = config(tmp_path, tiny_policy)
    sft(settings)
    with pytest.raises(ConfigError, match="already holds a run"):
        sft(settings)


def test_an_adapter_is_merged_into_the_result(tiny_policy: Path, tmp_path: Path):
    pytest.importorskip("peft")
    settings = config(tmp_path, tiny_policy, epochs=5, lora={"r": 2})
    sft(settings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    assert not any("lora" in name for name in model.state_dict())
    before = AutoModelForCausalLM.from_pretrained(tiny_policy)
    assert torch.equal(model.model.embed_tokens.weight, before.model.embed_tokens.weight)
    assert not torch.equal(
        model.model.layers[0].self_attn.q_proj.weight, before.model.layers[0].self_attn.q_proj.weight
    )
    lines = metrics_of(tmp_path / "run")
    assert lines[-1]["sft/loss"] < 0.7 * lines[1]["sft/loss"]


# Four bits cost more with random weights of 32 inputs than on real models (6% on SmolLM2, docs/how-to/lora.md).
@pytest.mark.parametrize(("quantization", "tolerance"), [("nf4", 0.2), ("int8", 0.02)])
def test_an_adapter_on_a_quantized_base_learns_as_much(
    quantization: str, tolerance: float, tiny_policy: Path, tmp_path: Path
):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install '.[quantization]'")
    settings = config(tmp_path, tiny_policy, epochs=8, lora={"r": 4})
    expected = sft(settings)
    quantized = {"quantization": quantization, "output": str(tmp_path / "quantized")}
    found = sft(settings.model_copy(update=quantized))
    learned = metrics_of(tmp_path / "run")
    assert expected["loss"] < learned[0]["sft/eval_loss"]
    assert learned[-1]["sft/loss"] < 0.5 * learned[1]["sft/loss"]
    assert metrics_of(tmp_path / "quantized")[-1]["sft/loss"] < 0.5 * learned[1]["sft/loss"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=tolerance)
    [checkpoint] = (tmp_path / "quantized" / "checkpoints").iterdir()
    assert all("lora_" in name for name in load_file(checkpoint / "weights.safetensors"))


def test_bad_data_starts_nothing(tiny_policy: Path, tmp_path: Path):
    settings = config(tmp_path, tiny_policy)
    Path(settings.data.path).write_text('{"prompt": "w0", "completon": "w1"}\n')
    with pytest.raises(DataError, match="did you mean 'completon'"):
        sft(settings)
    assert not (tmp_path / "run").exists()
