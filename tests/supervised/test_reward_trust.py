"""Reward models that one can trust: ensembles, early stopping, ties and weights, calibration, the gate."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from keel.cli.main import main
from keel.config import RewardConfig, TrainConfig, parse
from keel.core.preferences import bradley_terry_loss
from keel.data.preferences import Ranking
from keel.errors import ConfigError, DataError
from keel.learn.comparisons import Comparisons, pairwise_losses
from keel.models.ensemble import RewardEnsemble, load_reward_model
from keel.models.reward_model import RewardModel
from keel.run.reward_files import require_gate_pass
from keel.supervised import loop as supervised
from keel.supervised import reward as rewards
from keel.supervised.reward import reward
from keel.supervised.split import split_rankings
from keel.training.setup import build_training_setup
from keel.world import ALONE

from .. import runs


def rows(count: int = 40) -> list[dict[str, Any]]:
    """Answers with w9 in them are better, but one rater in four says the opposite."""
    made = []
    for i in range(count):
        good, bad = f" w{i % 8} w9", f" w{i % 7}"
        ranks = [2, 1] if i % 4 == 3 else [1, 2]
        made.append(
            {"prompt": f"w{10 + i % 20} w{i // 20}", "responses": [good, bad], "ranks": ranks, "rater": f"r{i % 4}"}
        )
    return made


def policy_run(tmp_path: Path, model: Path, rewards: list[dict[str, Any]], **changes: Any) -> TrainConfig:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "w1 w2"}\n')
    given = {"rewards": rewards, "prompts.path": str(prompts), **changes}
    return parse(TrainConfig, runs.settings(model, tmp_path / "policy", given))


def settings(tmp_path: Path, model: Path, written: list[dict[str, Any]] | None = None, **given: Any) -> RewardConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in written or rows()))
    own = {"output": str(tmp_path / "run"), "model": str(model), "data": {"path": str(path), "eval_fraction": 0.25}}
    optim = {"learning_rate": 0.01, "schedule": "constant"}
    return parse(RewardConfig, {**own, "batch_size": 8, "epochs": 2, "optim": optim, **given})


def test_an_ensemble_is_its_members_and_judges_as_one(tiny_policy: Path, tmp_path: Path):
    figures = reward(settings(tmp_path, tiny_policy, members=3))
    folder = tmp_path / "run" / "model"
    prompts, responses = ["w10", "w11"], [" w1 w9", " w3"]
    members = torch.stack([RewardModel.load(str(folder / f"member-{n}")).score(prompts, responses) for n in (1, 2, 3)])
    assert len({tuple(scores.tolist()) for scores in members}) == 3
    of = {name: RewardEnsemble.load(str(folder), name, 2.0).score(prompts, responses) for name in ("mean", "min")}
    torch.testing.assert_close(of["mean"], members.mean(0))
    torch.testing.assert_close(of["min"], members.min(0).values)
    lower = RewardEnsemble.load(str(folder), "lower", 2.0).score(prompts, responses)
    deviation = ((members - members.mean(0)) ** 2).mean(0).sqrt()
    torch.testing.assert_close(lower, members.mean(0) - 2.0 * deviation)
    assert figures["accuracy_low"] <= figures["accuracy"] <= figures["accuracy_high"]
    assert json.loads((tmp_path / "run" / "figures.json").read_text()) == figures


def test_members_keep_their_checkpoints_until_all_are_joined(tiny_policy: Path, tmp_path: Path):
    """So a run that ends in between can go on."""
    given = settings(tmp_path, tiny_policy, members=2, checkpoint={"keep_final": False})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards, "join_members", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reward(given)
    reward(given, resume=True)
    assert list(Path(given.output).rglob("checkpoints")) == []


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_members_have_the_same_data_and_other_orders_and_starts(tiny_policy: Path, tiny_gpt2: Path, tmp_path: Path):
    both = [str(tiny_policy), str(tiny_gpt2)]
    reward(settings(tmp_path, tiny_policy, members=3, member_models=both))
    runs = [tmp_path / "run" / "members" / n for n in "123"]
    kinds = [json.loads((run / "model/config.json").read_text())["model_type"] for run in runs]
    assert kinds == ["llama", "gpt2", "llama"]
    prompts = [
        {json.loads(line)["prompt"] for line in (run / "held_out.jsonl").read_text().splitlines()} for run in runs
    ]
    assert prompts[0] == prompts[1] == prompts[2]
    first = [json.loads((run / "metrics.jsonl").read_text().splitlines()[1])["reward/loss"] for run in runs]
    assert first[0] != first[2]


def test_an_ensemble_is_one_scorer_of_a_run_and_can_start_its_critic(tiny_policy: Path, tmp_path: Path):
    reward(settings(tmp_path, tiny_policy, members=2))
    folder = str(tmp_path / "run" / "model")
    judges = [{"model": folder, "combine": "lower", "std_coef": 0.5}]
    config = policy_run(tmp_path, tiny_policy, judges, **{"critic.init": "reward"})
    setup = build_training_setup(config, [], None, ALONE)
    assert len(setup.scorers) == 1
    assert setup.scorers[0].reward_model.combine == "lower"  # type: ignore[attr-defined]


def test_an_ensemble_goes_on_where_it_was_stopped(tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    straight = settings(tmp_path, tiny_policy, members=2, calibrate=True, checkpoint={"every": 1})
    figures = reward(straight)
    cut = straight.model_copy(update={"output": str(tmp_path / "cut")})
    update, calls = supervised.update, []

    def stops_in_the_second_member(*arguments: Any) -> dict[str, float]:
        calls.append(arguments)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return update(*arguments)

    monkeypatch.setattr(supervised, "update", stops_in_the_second_member)
    with pytest.raises(KeyboardInterrupt):
        reward(cut)
    assert not (tmp_path / "cut" / "model").exists()
    monkeypatch.setattr(supervised, "update", update)
    assert reward(cut, resume=True) == figures
    names = [Path("ensemble.json"), *(Path(f"member-{n}/model.safetensors") for n in (1, 2))]
    for name in names:
        assert (tmp_path / "run/model" / name).read_bytes() == (tmp_path / "cut/model" / name).read_bytes()


def test_patience_keeps_the_weights_that_were_best_on_watched_prompts(tiny_policy: Path, tmp_path: Path):
    given = {"epochs": 30, "eval_every": 4, "patience": 3, "data": {"path": str(tmp_path / "rows.jsonl")}}
    config = settings(tmp_path, tiny_policy, **given)
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"eval_fraction": 0.25, "watch_fraction": 0.3})}
    )
    figures = reward(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seen = {line["step"]: line["reward/eval_watched_loss"] for line in lines if "reward/eval_watched_loss" in line}
    assert list(seen) == list(range(0, lines[-1]["step"] + 1, 4))
    best = min(seen, key=lambda step: seen[step])
    assert (figures["best_step"], figures["watched_loss"]) == (best, pytest.approx(seen[best], abs=1e-6))
    assert lines[-1]["step"] == best + 3 * 4 < 30 * 23 // 8
    split = split_rankings(config)
    sides = [{ranking.prompt for ranking in side} for side in (split.train, split.watched, split.held_out)]
    assert all(sides)
    assert sum(map(len, sides)) == len(set.union(*sides))


def test_patience_resumes_to_the_byte(tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = settings(tmp_path, tiny_policy, epochs=30, eval_every=4, patience=2, checkpoint={"every": 3})
    straight = reward(config)
    cut = config.model_copy(update={"output": str(tmp_path / "cut")})
    update = supervised.update

    def stops(*arguments: Any) -> dict[str, float]:
        if arguments[1].step == 7:
            raise KeyboardInterrupt
        return update(*arguments)

    monkeypatch.setattr(supervised, "update", stops)
    with pytest.raises(KeyboardInterrupt):
        reward(cut)
    monkeypatch.setattr(supervised, "update", update)
    assert reward(cut, resume=True) == straight
    assert reward(cut, resume=True) == straight
    files = [tmp_path / run / "model" / "model.safetensors" for run in ("run", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.usefixtures("float64")
def test_ties_are_half_a_win_for_each():
    """Answers at 1, 0.5 and 0, ranked 1, 2, 2: log(1 + e^-.5), log(1 + e^-1), and the mean of both ways of the tie."""
    values = torch.tensor([1.0, 0.5, 0.0], requires_grad=True)
    comparisons = Comparisons.from_rankings(values, [Ranking("", ("", "", ""), (1, 2, 2))])
    ignored = pairwise_losses(comparisons, bradley_terry_loss)
    assert ignored.tolist() == pytest.approx([(0.4740769842 + 0.3132616875) / 2], abs=1e-9)
    halved = pairwise_losses(comparisons, bradley_terry_loss, "half")
    assert halved.tolist() == pytest.approx([(0.4740769842 + 0.3132616875 + 0.7240769842) / 3], abs=1e-9)
    tied = Comparisons.from_rankings(values[:2], [Ranking("", ("", ""), (1, 1))])
    tie = pairwise_losses(tied, bradley_terry_loss, "half")
    slope = torch.autograd.grad(tie.sum(), values)[0]
    assert slope.tolist() == pytest.approx([0.1224593312, -0.1224593312, 0.0], abs=1e-9)  # sigma(.5) - 1/2


def test_a_tie_learned_as_half_wins_ends_at_equal_scores_and_weights_shift_them(tiny_policy: Path, tmp_path: Path):
    """Three parts of weight for A and one for B, given as two rows: the scores end ln 3 apart."""
    pair = {"prompt": "w0", "chosen": " w1 w2", "rejected": " w3", "weight": 3.0}
    other = {"prompt": "w0", "chosen": " w3", "rejected": " w1 w2", "weight": 1.0}
    tie = {"prompt": "w5", "responses": [" w1 w2", " w3"], "ranks": [1, 1], "weight": 4.0}
    path = tmp_path / "rows.jsonl"
    data = {"path": str(path), "eval_path": str(path)}
    given = {"epochs": 200, "batch_size": 2, "center_coef": 0.0, "data": data, "ties": "half"}
    config = settings(tmp_path, tiny_policy, [pair, other, tie], **given)
    reward(config.model_copy(update={"optim": config.optim.model_copy(update={"schedule": "linear"})}))
    model = RewardModel.load(str(tmp_path / "run" / "model"))
    a, b, c, d = model.score(["w0", "w0", "w5", "w5"], [" w1 w2", " w3"] * 2).tolist()
    assert a - b == pytest.approx(1.0986123, abs=0.05)
    assert c - d == pytest.approx(0.0, abs=0.05)


def test_calibrated_scores_are_those_of_the_model_over_the_temperature(tiny_policy: Path, tmp_path: Path):
    plain = reward(settings(tmp_path, tiny_policy, epochs=8))
    other = settings(tmp_path, tiny_policy, epochs=8, calibrate=True, output=str(tmp_path / "calibrated"))
    figures = reward(other)
    assert figures["temperature"] == plain["temperature"] != 1.0
    assert (figures["accuracy"], figures["uncalibrated_loss"]) == (plain["accuracy"], plain["loss"])
    assert figures["loss"] == plain["calibrated_loss"]
    judges = [RewardModel.load(str(tmp_path / run / "model")) for run in ("run", "calibrated")]
    before, after = (judge.score(["w10", "w11"], [" w1 w9", " w3"]) for judge in judges)
    torch.testing.assert_close(after, before / plain["temperature"], rtol=1e-5, atol=1e-6)


def test_a_model_below_its_gate_is_saved_refused_and_can_be_let_through(
    tiny_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    run = tmp_path / "run"
    command = ["reward", "--output", str(run), "--model", str(tiny_policy), "--data.path", str(path)]
    assert main([*command, "--data.eval-fraction", "0.25", "--gate", "accuracy=1.0,loss=9"]) == 1
    shown = capsys.readouterr()
    assert "below the gate: accuracy" in shown.err
    assert "is not >= 1" in shown.err
    assert "is not <= 0.9" not in shown.err
    folder = str(run / "model")
    with pytest.raises(ConfigError, match="failed its gate: accuracy"):
        build_training_setup(policy_run(tmp_path, tiny_policy, [{"model": folder}]), [], None, ALONE)
    free = policy_run(tmp_path, tiny_policy, [{"model": folder, "ungated": True}])
    assert build_training_setup(free, [], None, ALONE).scorers
    assert "Failed its gate" in (run / "report.html").read_text()


def test_a_model_that_reaches_its_gate_goes_on(tiny_policy: Path, tmp_path: Path):
    reward(settings(tmp_path, tiny_policy, gate={"accuracy": 0.0, "loss": 9.0}))
    require_gate_pass(str(tmp_path / "run" / "model"))
    (tmp_path / "run" / "model" / "gate.json").write_text("{}")
    with pytest.raises(ConfigError, match="the verdict of the gate cannot be read"):
        require_gate_pass(str(tmp_path / "run" / "model"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gate": {"acuracy": 0.6}}, "unknown metric acuracy"),
        ({"gate": {"accuracy": 65}}, "accuracy is at most 1"),
        ({"member_models": ["x"]}, "member_models needs an ensemble"),
        ({"loss": "listwise", "ties": "half"}, "ties: half needs loss: pairwise"),
        ({"gate": {"ece": 0.1}, "data": {"path": "x", "eval_fraction": 0.0}}, "gate needs held-out prompts"),
        ({"calibrate": True, "data": {"path": "x", "eval_fraction": 0.0}}, "calibrate needs held-out prompts"),
    ],
)
def test_settings_that_do_not_fit_together(tmp_path: Path, given: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, tmp_path, **given)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"members": [".."], "temperature": 1}',
        '{"members": "a", "temperature": 1}',
        '{"members": [], "temperature": 1}',
        '{"members": ["../x"], "temperature": 1}',
        "{",
    ],
)
def test_a_list_of_members_that_is_none(tmp_path: Path, text: str):
    (tmp_path / "ensemble.json").write_text(text)
    with pytest.raises(ConfigError, match="members"):
        load_reward_model(str(tmp_path))


@pytest.mark.parametrize("members", [1, 2])
def test_without_held_out_prompts_there_is_a_model_and_no_judgement(tiny_policy: Path, tmp_path: Path, members: int):
    data = {"path": str(tmp_path / "rows.jsonl"), "eval_fraction": 0.0}
    figures = reward(settings(tmp_path, tiny_policy, members=members, data=data))
    assert "accuracy" not in figures
    assert load_reward_model(str(tmp_path / "run" / "model")).score(["w10"], [" w1"]).shape == (1,)


@pytest.mark.parametrize("side", ["held-out", "watched"])
def test_a_side_that_prefers_nothing_is_said_before_anything_is_learned(tiny_policy: Path, tmp_path: Path, side: str):
    tie = {"prompt": "w5", "responses": [" w1", " w2"], "ranks": [1, 1]}
    (tmp_path / "ties.jsonl").write_text(json.dumps(tie) + "\n" + json.dumps(rows()[0] | {"weight": 0.0}) + "\n")
    if side == "held-out":
        config = settings(tmp_path, tiny_policy, data={"path": "", "eval_path": ""})
        where = {"path": str(tmp_path / "rows.jsonl"), "eval_path": str(tmp_path / "ties.jsonl")}
        config = config.model_copy(update={"data": config.data.model_copy(update=where)})
    else:
        ties = [tie | {"prompt": f"w{i}"} for i in range(10, 30)]
        config = settings(tmp_path, tiny_policy, [*rows(2), *ties], ties="half", patience=1)
        config = config.model_copy(update={"seed": 1, "data": config.data.model_copy(update={"eval_fraction": 0.0})})
    with pytest.raises(DataError, match=f"no {side} row prefers one response to another"):
        reward(config)


def test_one_model_has_nothing_to_combine(tiny_policy: Path):
    with pytest.raises(ConfigError, match="`combine: lower` is for an ensemble"):
        load_reward_model(str(tiny_policy), "lower")


def test_the_members_of_a_model_below_its_gate_are_refused_as_well(tiny_policy: Path, tmp_path: Path):
    reward(settings(tmp_path, tiny_policy, members=2, gate={"accuracy_low": 1.0}))
    for folder in ("run/model", "run/model/member-1"):
        with pytest.raises(ConfigError, match="failed its gate"):
            require_gate_pass(str(tmp_path / folder))


def test_a_gate_can_be_set_anew_on_a_finished_model(tiny_policy: Path, tmp_path: Path):
    given = settings(tmp_path, tiny_policy, gate={"accuracy_low": 1.0})
    reward(given)
    with pytest.raises(ConfigError, match="failed its gate"):
        require_gate_pass(str(tmp_path / "run" / "model"))
    reward(given.model_copy(update={"gate": {"accuracy": 0.0}}), resume=True)
    require_gate_pass(str(tmp_path / "run" / "model"))


@pytest.mark.parametrize(
    ("gate", "count", "message"),
    [
        ({"accuracy_low": 0.1}, 8, "gate: needs at least 10 held-out prompts, has 2"),
        ({"ece": 0.9}, 40, "gate.ece: needs at least 100 held-out pairs, has 10"),
        ({"ece_high": 0.9}, 40, "gate.ece_high: needs at least 100 held-out pairs, has 10"),
    ],
)
def test_a_gate_with_too_little_data_is_refused_before_training(
    tiny_policy: Path, tmp_path: Path, gate: dict[str, float], count: int, message: str
):
    with pytest.raises(ConfigError, match=message):
        reward(settings(tmp_path, tiny_policy, rows(count), gate=gate))
    assert not (tmp_path / "run").exists()


def test_an_ensemble_under_way_is_a_run(tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stops(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(supervised, "update", stops)
    given = settings(tmp_path, tiny_policy, members=2)
    with pytest.raises(KeyboardInterrupt):
        reward(given)
    with pytest.raises(ConfigError, match="already holds a run"):
        reward(given.model_copy(update={"members": 1}))
