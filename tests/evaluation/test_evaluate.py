"""The judge: its figures are what they are called, and no answer depends on the batch around it."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from keel.cli.main import main
from keel.config import DecodingSettings, EvaluateConfig, PromptSettings, SampleConfig, parse
from keel.data.batches import Rollouts, ScoredRollouts
from keel.errors import ConfigError, DataError
from keel.evaluation.evaluate import evaluate_policies, sample_and_score
from keel.evaluation.frontier import complete_config
from keel.evaluation.judged import comparison
from keel.evaluation.sample import EvaluatedPolicy, load_policy, sample_responses
from keel.evaluation.sides import short_names
from keel.rollout.score import score
from keel.rollout.scorers import build_scorers

from ..runs import train

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
def player(tiny_policy: Path, prompts: str) -> EvaluatedPolicy:
    return load_policy(str(tiny_policy), PromptSettings(path=prompts, column="text"), DECODING)


def settings(policy: Path | str | list[str], prompts: str, **more: object) -> EvaluateConfig:
    given = policy if isinstance(policy, list) else str(policy)
    base = {"policy": given, "prompts": {"path": prompts, "column": "text"}, "sampling": DECODING.model_dump()}
    return parse(EvaluateConfig, {**base, **more})


def checkpoints_of(run: Path, prompts: str, **more: object) -> EvaluateConfig:
    return parse(EvaluateConfig, {"checkpoints": str(run), "prompts": {"path": prompts, "column": "text"}, **more})


def test_win_rate_counts_all_pairs_of_a_prompt_and_ties_half():
    ours, theirs = torch.tensor([[1.0, 2.0], [5.0, 5.0]]), torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    figures = comparison(ours, theirs)
    assert figures["win_rate"] == pytest.approx(((0.5 + 0 + 1 + 0) / 4 + 1) / 2)
    assert figures["ties"] == 1 / 8
    assert figures["score_difference"] == pytest.approx((-0.5 + 5) / 2)
    assert figures["win_rate_low"] < 0.1  # two prompts say next to nothing
    assert figures["win_rate_high"] > 0.99


def test_a_policy_can_answer_more_often_than_the_other():
    figures = comparison(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2.0]]))
    assert (figures["win_rate"], figures["score_difference"]) == (0.5, 0.0)


def test_answers_do_not_depend_on_the_batch_size(player: EvaluatedPolicy):
    def texts(batch_size: int) -> list[str]:
        decoding = DECODING.model_copy(update={"batch_size": batch_size})
        return [text for rollouts in player.sample_responses(decoding, 3, "x") for text in rollouts.texts]

    assert texts(64) == texts(4) == texts(1)
    assert len(set(texts(64))) > 1


def rows(rollouts: Rollouts, row: int) -> tuple[list[int], list[int]]:
    return list(rollouts.prompts[row].tokens), rollouts.response_tokens[row][rollouts.response_mask[row]].tolist()


def test_figures_are_those_of_plain_transformers(
    player: EvaluatedPolicy, tiny_policy: Path, tiny_gpt2: Path, prompts: str
):
    """kl = mean over answers of the summed k1; entropy and reference_logprob = means over tokens."""
    from transformers import AutoModelForCausalLM

    config = settings(tiny_policy, prompts, reference=str(tiny_gpt2), seed=4)
    figures = evaluate_policies(config)
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (tiny_policy, tiny_gpt2)]
    kl, entropy, reference_logprob, lengths, ends = [], [], [], [], []
    for rollouts in player.sample_responses(DECODING, 4, "evaluate", "policy"):
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
    assert list(figures) == ["prompts", "responses_per_prompt", "policy"]
    assert (figures["prompts"], figures["responses_per_prompt"]) == (3, 3)
    assert set(figures["policy"]) == {f"{name}{end}" for name in expected for end in ("", "_low", "_high")}
    for name, value in expected.items():
        assert figures["policy"][name] == pytest.approx(value, abs=1e-4)
        assert figures["policy"][f"{name}_low"] <= figures["policy"][name] <= figures["policy"][f"{name}_high"]


def test_two_policies(tiny_policy: Path, tiny_gpt2: Path, prompts: str, tmp_path: Path):
    config = settings(tiny_policy, prompts, against=str(tiny_gpt2), output=str(tmp_path / "deep" / "figures.json"))
    figures = evaluate_policies(config, [count_w5])
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


def test_each_of_several_policies_is_judged_as_it_would_be_alone(
    tiny_policy: Path, tiny_gpt2: Path, prompts: str, tmp_path: Path
):
    folders = [
        str(shutil.copytree(source, tmp_path / "runs" / name / "policy"))
        for source, name in (
            (tiny_policy, "ppo"),
            (tiny_gpt2, "dpo"),
        )
    ]
    more = {"against": str(tiny_policy), "output": str(tmp_path / "all.json")}
    figures = evaluate_policies(settings(folders, prompts, **more), [count_w5])
    assert list(figures) == ["prompts", "responses_per_prompt", "policies", "against"]
    assert list(figures["policies"]) == ["ppo", "dpo"]
    for name, folder in zip(("ppo", "dpo"), folders, strict=True):
        alone = evaluate_policies(settings(folder, prompts, against=str(tiny_policy)), [count_w5])
        assert alone["against"] == figures["against"]
        compared = {key: alone[key] for key in alone if key.startswith(("win_rate", "length", "score", "ties"))}
        assert len(compared) == 13
        assert figures["policies"][name] == alone["policy"] | compared
    record = json.loads((tmp_path / "all.json").read_text())
    assert record["figures"] == figures
    for side in ("ppo", "dpo", "against"):
        assert all(count_w5(row[side]) == row[f"{side}_scores"] for row in record["answers"])


def test_several_policies_need_nothing_to_be_compared_with(tiny_policy: Path, tiny_gpt2: Path, prompts: str):
    figures = evaluate_policies(settings([str(tiny_policy), str(tiny_gpt2)], prompts, reference=str(tiny_gpt2)))
    one, other = figures["policies"].values()
    assert "against" not in figures
    assert one["kl"] > 0.1
    assert other["kl"] == 0.0


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/ppo/policy", "runs/a2c/policy", "runs/dpo/policy/"], ["ppo", "a2c", "dpo"]),
        (["a/ppo/policy", "b/ppo/policy"], ["a", "b"]),
        (["s0/ppo/policy", "s1/ppo/policy", "s0/dpo/policy"], ["s0/ppo", "s1/ppo", "s0/dpo"]),
        (["gpt2", "runs/ppo/policy"], ["gpt2", "policy"]),
        (["run", "run/checkpoints/step-2/policy"], ["run", "policy"]),
        (["a", "a/a"], ["a", "a/a"]),
        (["x/against", "y/prompt"], ["x/against", "y/prompt"]),  # those two mean something else in the output
    ],
)
def test_policies_have_the_shortest_names_that_tell_them_apart(paths: list[str], names: list[str]):
    assert short_names(paths) == names


@pytest.mark.parametrize("given", [["runs/ppo/policy", "runs/ppo/policy/"], []])
def test_no_policy_or_one_twice_is_refused(given: list[str], prompts: str):
    with pytest.raises(ConfigError, match=r"the same policy is in the list twice|at least 1 item"):
        settings(given, prompts)


def test_a_missing_folder_is_noticed_before_anything_is_sampled(tiny_policy: Path, prompts: str, tmp_path: Path):
    asked: list[str] = []
    with pytest.raises(ConfigError, match="no such model folder"):
        evaluate_policies(
            settings([str(tiny_policy), str(tmp_path / "none")], prompts), [lambda completions: asked.append("")]
        )
    assert asked == []


def test_other_vocabularies_may_not_drop_other_prompts(tiny_policy: Path, prompts: str, tmp_path: Path):
    other = shutil.copytree(tiny_policy, tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text().replace('"w27"', '"x27"'))
    config = settings(tiny_policy, prompts, against=str(other))
    dropping = config.model_copy(update={"prompts": config.prompts.model_copy(update={"too_long": "drop"})})
    with pytest.raises(ConfigError, match="would drop different prompts"):
        evaluate_policies(dropping)


def length_of(completions: list[str], **columns: object) -> list[float]:
    return [float(len(text.split())) for text in completions]


def test_the_judge_decides_and_the_score_stays_the_sum(tiny_policy: Path, tiny_gpt2: Path, prompts: str):
    more = {"against": str(tiny_gpt2), "seed": 1}
    by_sum = evaluate_policies(settings(tiny_policy, prompts, **more), [count_w5, length_of])
    by_one = evaluate_policies(settings(tiny_policy, prompts, judge="length_of", **more), [count_w5, length_of])
    assert by_one["policy"] == by_sum["policy"]
    sides = [by_one[side]["rewards/length_of"] for side in ("policy", "against")]
    assert by_one["score_difference"] == pytest.approx(sides[0] - sides[1])
    assert by_one["score_difference"] != by_sum["score_difference"]
    with pytest.raises(ConfigError, match="no scorer is called 'length'; did you mean length_of"):
        evaluate_policies(settings(tiny_policy, prompts, judge="length", **more), [count_w5, length_of])


def test_a_slice_has_the_figures_of_its_own_file(tiny_policy: Path, tiny_gpt2: Path, prompts: str, tmp_path: Path):
    """The first prompt alone draws the same random numbers as in the whole file."""
    first = tmp_path / "first.jsonl"
    first.write_text(Path(prompts).read_text().splitlines()[0] + "\n")
    more = {"against": str(tiny_gpt2), "slices": ["topic"]}
    figures = evaluate_policies(settings(tiny_policy, prompts, **more), [count_w5])
    assert {name: part["prompts"] for name, part in figures["slices"].items()} == {f"topic={i}": 1 for i in (1, 2, 3)}
    alone = evaluate_policies(settings(tiny_policy, str(first), **more), [count_w5])
    assert figures["slices"]["topic=1"] == alone["slices"]["topic=1"]
    assert alone["slices"]["topic=1"] == {name: value for name, value in alone.items() if name != "slices"}


def test_the_best_of_one_is_the_mean_and_of_all_the_largest(tiny_policy: Path, prompts: str, tmp_path: Path):
    output = tmp_path / "figures.json"
    figures = evaluate_policies(settings(tiny_policy, prompts, best_of=3, output=str(output)), [length_of])
    curve = figures["best_of"]["policy"]
    largest = [max(row["policy_scores"]) for row in json.loads(output.read_text())["answers"]]
    assert curve[0]["score"] == pytest.approx(figures["policy"]["score"])
    assert curve[2]["score"] == pytest.approx(sum(largest) / 3)
    assert curve[2]["rewards/length_of"] == curve[2]["score"]
    with pytest.raises(ConfigError, match="best_of: 4 is more than the 3 responses to a prompt; lower it, or raise"):
        settings(tiny_policy, prompts, best_of=4)
    with pytest.raises(ConfigError, match="best_of needs a scorer"):
        evaluate_policies(settings(tiny_policy, prompts, best_of=3))


def test_what_one_answer_is_worth_in_draws_of_the_other(tiny_policy: Path, tiny_gpt2: Path, prompts: str):
    figures = evaluate_policies(settings(tiny_policy, prompts, against=str(tiny_gpt2), best_of=3), [length_of])
    scores = [point["score"] for point in figures["best_of"]["against"]]
    worth = figures["policy"]["worth_best_of"]
    mean = figures["policy"]["score"]
    assert scores == sorted(scores)
    assert (mean > scores[-1]) if worth is None else (scores[worth - 1] >= mean)


# ---- people ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def blind(tiny_policy: Path, tiny_gpt2: Path, tmp_path: Path) -> EvaluateConfig:
    rows = [{"text": f"w{i} w{j}"} for i in range(4) for j in range(5)]
    path = tmp_path / "twenty.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return settings(tiny_policy, str(path), against=str(tiny_gpt2), pairs=str(tmp_path / "pairs.jsonl"))


def judged_by(pairs: Path, target: Path, marks: dict[str, list[list[int]]]) -> str:
    """An export as keel rank writes it: `marks` of each rater for the pairs in their order."""
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    lines = [
        {**row, "ranks": ranks, "rater": rater, "weight": 1.0, "source": "", "comment": "", "tags": []}
        for rater, given in marks.items()
        for row, ranks in zip(rows, given, strict=True)
    ]
    target.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(target)


def test_pairs_are_blind_and_their_key_lies_beside(blind: EvaluateConfig, tmp_path: Path):
    figures = evaluate_policies(blind, [length_of])
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    key = json.loads((tmp_path / "pairs.key.json").read_text())
    assert all(row.keys() == {"prompt", "responses"} for row in rows)
    assert figures["pairs"]["pairs"] == len(rows) == 20 - figures["pairs"]["equal"]
    assert {pair["ours"] for pair in key["pairs"]} == {0, 1}  # the order is drawn
    text = (tmp_path / "pairs.jsonl").read_text()
    assert not any(str(name) in text for name in (blind.policy[0], blind.against, "score"))
    for pair in key["pairs"]:
        ours, theirs = pair["responses"][pair["ours"]], pair["responses"][1 - pair["ours"]]
        assert pair["scores"] == [len(ours.split()), len(theirs.split())]


def test_pairs_are_not_written_over(blind: EvaluateConfig):
    evaluate_policies(blind, [length_of])
    before = Path(str(blind.pairs)).read_bytes()
    with pytest.raises(ConfigError, match="already exists"):
        evaluate_policies(blind, [length_of])
    assert Path(str(blind.pairs)).read_bytes() == before


def test_what_people_said_becomes_a_win_rate(blind: EvaluateConfig, tmp_path: Path):
    evaluate_policies(blind, [length_of])
    pairs = json.loads((tmp_path / "pairs.key.json").read_text())["pairs"]
    shown = [pair for pair in pairs if pair["responses"][0] != pair["responses"][1]]
    for_ours = [[1, 2] if pair["ours"] == 0 else [2, 1] for pair in shown]
    longer = [[1, 1] if s[0] == s[1] else [1, 2] if (s[0] > s[1]) == (o == 0) else [2, 1]
              for s, o in ((pair["scores"], pair["ours"]) for pair in shown)]  # fmt: skip
    export = judged_by(tmp_path / "pairs.jsonl", tmp_path / "judged.jsonl", {"anna": for_ours, "ben": longer})
    people = evaluate_policies(blind.model_copy(update={"judgements": export}), [length_of])["people"]
    equal = len(pairs) - len(shown)
    ben = [0.5 + 0.5 * ((p["scores"][0] > p["scores"][1]) - (p["scores"][0] < p["scores"][1])) for p in shown]
    assert people["win_rate"] == pytest.approx((sum((1 + win) / 2 for win in ben) + 0.5 * equal) / 20)
    assert people["win_rate_low"] <= people["win_rate"] <= people["win_rate_high"]
    assert (people["judgements"], people["raters"], people["judged_pairs"]) == (2 * len(shown), 2, len(shown))
    assert (people["unjudged_pairs"], people["equal_pairs"], people["others"]) == (0, equal, 0)
    assert 0.5 < people["agreement"] < 1.0  # ben is of the scorer's mind, anna is not asked about length


def test_agreement_is_whole_where_people_judge_as_the_scorer_does(blind: EvaluateConfig, tmp_path: Path):
    evaluate_policies(blind, [length_of])
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    sizes = [[len(text.split()) for text in row["responses"]] for row in rows]
    marks = [[1, 1] if a == b else [1, 2] if a > b else [2, 1] for a, b in sizes]
    export = judged_by(tmp_path / "pairs.jsonl", tmp_path / "judged.jsonl", {"anna": marks})
    people = evaluate_policies(blind.model_copy(update={"judgements": export}), [length_of])["people"]
    assert people["agreement"] == 1.0
    assert people["agreement_low"] < 1.0  # twenty pairs are no proof


def test_other_weights_or_files_are_no_judgement_of_these(blind: EvaluateConfig, tiny_gpt2: Path, tmp_path: Path):
    evaluate_policies(blind, [length_of])
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    export = judged_by(tmp_path / "pairs.jsonl", tmp_path / "judged.jsonl", {"anna": [[1, 2]] * len(rows)})
    asked = {"judgements": export}
    moved = shutil.copytree(tiny_gpt2, tmp_path / "moved")
    with pytest.raises(ConfigError, match="these pairs are of other policies or weights"):
        evaluate_policies(blind.model_copy(update={**asked, "policy": [str(moved)]}), [length_of])
    (tmp_path / "judged.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n")
    with pytest.raises(DataError, match="in which ties are lost -> export it with --form rankings"):
        evaluate_policies(blind.model_copy(update=asked), [length_of])
    (tmp_path / "judged.jsonl").write_text(json.dumps({"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]}) + "\n")
    with pytest.raises(DataError, match="no ranking in this file is of these pairs"):
        evaluate_policies(blind.model_copy(update=asked), [length_of])
    (tmp_path / "pairs.key.json").unlink()
    with pytest.raises(ConfigError, match="the key of the pairs cannot be read"):
        evaluate_policies(blind.model_copy(update=asked), [length_of])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"pairs": "p.jsonl"}, "pairs: needs `against`"),
        ({"judgements": "j.jsonl"}, "set `pairs` too"),
        ({"checkpoints": "runs/x"}, "give either policy or checkpoints"),
    ],
)
def test_settings_that_need_each_other(more: dict[str, str], message: str, prompts: str):
    with pytest.raises(ConfigError, match=message):
        settings("p", prompts, **more)


def test_a_gate_and_pairs_are_for_one_policy(prompts: str):
    for more in ({"gate": "score>=0"}, {"pairs": "p.jsonl", "against": "c"}):
        with pytest.raises(ConfigError, match="only with one policy"):
            settings(["a", "b"], prompts, **more)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_with_checkpoints(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "ppo"
    changes = {"steps": 4, "checkpoint": {"every": 1, "keep": 0}, "optim.learning_rate": 1e-2}
    train(tiny_policy, folder, changes, scorers=[length_of])
    return folder


def test_the_start_every_checkpoint_and_the_result_answer_with_the_same_random_numbers(
    run_with_checkpoints: Path, tiny_policy: Path, prompts: str
):
    config = checkpoints_of(run_with_checkpoints, prompts, sampling=DECODING.model_dump())
    figures = evaluate_policies(config, [length_of])
    sides = ["start", "step 1", "step 2", "step 3", "step 4"]
    assert list(figures["policies"]) == sides
    assert figures["policies"]["start"]["kl"] == 0.0
    assert figures["policies"]["step 4"]["kl"] > 0.0
    points = figures["frontier"]["points"]
    assert [point["step"] for point in points] == [0, 1, 2, 3, 4]
    assert [point["kl"] for point in points] == [figures["policies"][side]["kl"] for side in sides]
    result = settings(run_with_checkpoints / "policy", prompts, reference=str(tiny_policy))
    alone = evaluate_policies(result, [length_of])["policy"]
    assert figures["policies"]["step 4"] == alone


def test_what_is_not_given_is_that_of_the_run(run_with_checkpoints: Path, tiny_policy: Path, prompts: str):
    own = complete_config(checkpoints_of(run_with_checkpoints, prompts, sampling={"temperature": 0.5}))
    assert (own.sampling.max_response_tokens, own.sampling.temperature) == (6, 0.5)
    assert own.reference == str(tiny_policy)


def test_a_folder_without_a_run_has_no_checkpoints(tmp_path: Path, prompts: str):
    with pytest.raises(ConfigError, match="this folder holds no run"):
        evaluate_policies(checkpoints_of(tmp_path, prompts), [length_of])


def test_the_table_has_a_column_for_each_policy(
    tiny_policy: Path,
    tiny_gpt2: Path,
    prompts: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "count.py").write_text(
        "def w5(completions, **_):\n    return [t.split().count('w5') * 1.0 for t in completions]\n"
    )
    common = ["--prompts.path", prompts, "--prompts.column", "text", "--against", str(tiny_policy)]
    common += ["--sampling.max-response-tokens", "5", "--rewards", json.dumps({"function": f"{tmp_path}/count.py:w5"})]
    assert main(["evaluate", "--policy", str(tiny_policy), "--policy", str(tiny_gpt2), *common]) == 0
    shown = capsys.readouterr().out
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in shown.splitlines()
        if "│" in line
    }
    assert [len(cells) for cells in rows.values()] == [3] * len(rows)
    assert list(rows)[:5] == ["win rate", "LC win rate", "score difference", "ties", "score"]
    assert re.fullmatch(r"0\.\d+ \[[\d.]+, [\d.]+\]", rows["win rate"][1])
    assert rows["win rate"][2] == ""
    (tmp_path / "run.yaml").write_text(f"policy: {tiny_policy}\n")
    assert main(["evaluate", str(tmp_path / "run.yaml"), *common, "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out))[2:4] == ["policy", "against"]


def test_a_policy_is_no_better_than_itself(tiny_policy: Path, prompts: str):
    figures = evaluate_policies(
        settings(tiny_policy, prompts, against=str(tiny_policy)), [lambda completions: [1.0] * len(completions)]
    )
    assert (figures["win_rate"], figures["ties"], figures["score_difference"]) == (0.5, 1.0, 0.0)
    assert figures["policy"]["kl"] == 0.0
    assert figures["policy"]["length"] != figures["against"]["length"]  # each side draws its own numbers


def test_kl_needs_one_vocabulary(tiny_policy: Path, prompts: str, tmp_path: Path):
    other = shutil.copytree(tiny_policy, tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text().replace('"w27"', '"x27"'))
    figures = evaluate_policies(settings(tiny_policy, prompts, against=str(other)), [count_w5])
    assert "kl" not in figures["policy"]
    assert figures["against"]["kl"] == 0.0
    with pytest.raises(ConfigError, match="vocabulary"):
        evaluate_policies(settings(tiny_policy, prompts, reference=str(other)))


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
    written = sample_responses(config)
    found = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [(row["text"], row["topic"]) for row in found] == [("w1 w2", 1), ("w3", 2), ("w4 w5 w6 w7", 3)]
    assert all(row.keys() == {"text", "topic", "responses"} for row in found)  # ranks spoke of other answers
    assert all(len(set(row["responses"])) == 1 for row in found)  # the most likely token leaves no choice
    assert (written["prompts"], written["responses"]) == (3, 6)


def test_what_cannot_fit_is_refused(tiny_policy: Path, prompts: str):
    with pytest.raises(
        ConfigError, match=r"longest prompt and response have 258 tokens, but the model has only 256 positions"
    ):
        evaluate_policies(settings(tiny_policy, prompts, sampling={"max_response_tokens": 254}))


@pytest.mark.parametrize("option", ["output", "pairs"])
def test_a_file_that_cannot_be_written_is_told_before_anything_is_loaded(prompts: str, tmp_path: Path, option: str):
    (tmp_path / "file").write_text("")
    (tmp_path / "d.jsonl" / "x").mkdir(parents=True)
    for name, says in (("file/d.jsonl", "cannot write here"), ("d.jsonl", "this is a folder|already exists")):
        config = settings("./nosuch", prompts, against="./nosuch2", **{option: str(tmp_path / name)})
        with pytest.raises(ConfigError, match=says):
            evaluate_policies(config)
    made = settings("./nosuch", prompts, against="./nosuch2", **{option: str(tmp_path / "new" / "e.jsonl")})
    with pytest.raises(ConfigError, match="no such model folder"):
        evaluate_policies(made)
    assert list((tmp_path / "new").iterdir()) == []  # the folder is made, nothing is left in it


def test_the_score_of_the_progress_line_is_that_of_all_answers_so_far(player: EvaluatedPolicy):
    shown: list[float] = []
    scores = iter([1.0, 3.0, 8.0])

    def scoring(rollouts: Rollouts) -> ScoredRollouts:
        return score(rollouts, build_scorers([], [lambda completions, **_: [next(scores)] * len(completions)]), None)

    decoding = DECODING.model_copy(update={"batch_size": 3})
    show = lambda done, figures: shown.append(figures["score"])  # noqa: E731
    sample_and_score(player, None, scoring, decoding, 0, "policy", show=show)
    assert shown == [1.0, 2.0, 4.0]
