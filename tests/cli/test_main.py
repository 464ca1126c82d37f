"""What a person sees: help at once, one clean line for each mistake, the right exit code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from keel.cli import main as cli
from keel.cli.help import Verb
from keel.cli.settings import read_command
from keel.config import QuickstartConfig, RankConfig, SampleConfig
from keel.errors import CheckpointError, ConfigError, DataError, Diverged, RewardError

REWARDS = "def longer(completions, **columns):\n    return [float(len(text)) for text in completions]\n"


@pytest.fixture
def recipe(tmp_path: Path, tiny_policy: Path) -> Path:
    """A YAML file for `keel train` that works as it is."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w1 w2"}\n{"prompt": "w3"}\n')
    (tmp_path / "rewards.py").write_text(REWARDS)
    settings = {
        "output": str(tmp_path / "run"),
        "steps": 2,
        "policy": {"model": str(tiny_policy)},
        "prompts": {"path": str(tmp_path / "prompts.jsonl"), "max_tokens": 8},
        "rollout": {"batch_size": 4, "max_response_tokens": 6},
        "rewards": [{"function": f"{tmp_path / 'rewards.py'}:longer"}],
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """Exit code and the one line on standard error."""
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("keel: ")
    assert captured.out == ""
    return code, lines[0]


# ---- help, version, verbs -------------------------------------------------------------------------------------------


def test_help_loads_nothing_heavy():
    script = (
        "import sys; from keel.cli.main import main; code = main(['--help']);"
        "heavy = {'torch', 'transformers', 'datasets', 'pydantic', 'yaml', 'rich'} & set(sys.modules);"
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb in cli.VERBS:
        assert f"  {verb}" in done.stdout


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_a_verb_needs_no_torch(verb: str):
    script = (
        f"import sys; from keel.cli.main import main\ntry:\n    main(['{verb}', '--help'])\n"
        "except SystemExit as done:\n"
        "    sys.exit(done.code or bool({'torch', 'pydantic_settings', 'rich.table'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"example:\n  keel {verb}" in done.stdout
    assert "RUN.yaml" in done.stdout
    assert "None" not in done.stdout


def test_help_all_of_train_explains_every_setting(capsys: pytest.CaptureFixture[str]):
    from keel.config import TrainConfig, setting_names

    with pytest.raises(SystemExit) as done:
        cli.main(["train", "--help-all"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    for name in setting_names(TrainConfig):
        assert f"--{name.replace('_', '-')} " in text, name
    assert "(default: 0.05)" in text
    assert "timeout_seconds" in text


def test_version(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("keel ")


def test_help_has_no_words_of_the_library_below(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main(["drift", "--help-all"])
    assert "ifdef" not in capsys.readouterr().out


def test_no_verb_shows_the_help(capsys: pytest.CaptureFixture[str]):
    assert cli.main([]) == 2
    assert "usage: keel VERB" in capsys.readouterr().out


def test_unknown_verb(capsys: pytest.CaptureFixture[str]):
    assert fails(capsys, "trian") == (2, "keel: error: unknown verb trian; did you mean train? -> keel --help")


# ---- settings that cannot be used: exit 2, nothing started -----------------------------------------------------------


def test_typo_in_the_yaml(capsys: pytest.CaptureFixture[str], recipe: Path):
    recipe.write_text(recipe.read_text().replace("batch_size", "batchsize"))
    code, line = fails(capsys, "train", recipe)
    assert code == 2
    assert line == f"keel: error: {recipe}: unknown setting rollout.batchsize; did you mean batch_size?"


@pytest.mark.parametrize(
    ("line", "section", "first"),
    [("policy: distilgpt2", "policy", "model"), ("policy: {model: x}\nrewards: [judge.py]", "rewards.0", "model")],
)
def test_a_value_where_a_section_should_be(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, line: str, section: str, first: str
):
    (tmp_path / "run.yaml").write_text(f"output: run\nprompts: {{path: p.jsonl}}\n{line}\n")
    code, said = fails(capsys, "train", tmp_path / "run.yaml")
    assert code == 2
    assert said.endswith(f"run.yaml: {section} is a section of settings; did you mean {section}.{first}?")


def test_no_such_yaml(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    code, line = fails(capsys, "train", tmp_path / "none.yaml")
    assert code == 2
    assert line.startswith(f"keel: error: {tmp_path}/none.yaml: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\npolicy: {model: x\nsteps: 3\n", "run.yaml:3: broken YAML: expected ',' or '}', but got ':'"),
        ("seed: 1\n\tsteps: 2\n", "run.yaml:2: broken YAML"),
        ("seed: 1\nsteps: 2\nseed: 3\n", "run.yaml:3: broken YAML: seed occurs twice"),
        ("- a\n- b\n", "run.yaml: expected `name: value` lines, got list"),
        ("", "run.yaml: expected `name: value` lines, got NoneType"),
        ("!!python/object/apply:os.system [ls]\n", "run.yaml:1: broken YAML: could not determine a constructor"),
        ("seed: 1\x00\n", "run.yaml: broken YAML"),
    ],
)
def test_broken_yaml(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, expected: str):
    (tmp_path / "run.yaml").write_text(text)
    code, line = fails(capsys, "sft", tmp_path / "run.yaml")
    assert code == 2
    assert expected in line


def test_yaml_that_is_no_text(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    code, line = fails(capsys, "sft", tmp_path / "run.yaml")
    assert code == 2
    assert "not UTF-8" in line


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--algorithm.klcoef", "1"], "unknown setting --algorithm.klcoef; did you mean --algorithm.kl-coef?"),
        (["--resum"], "unknown setting --resum; did you mean --resume?"),
        (["--algorithm.name", "pppo"], "algorithm.name: Input should be 'ppo', 'a2c'"),
        (["--steps"], "--steps needs a value"),
        (["--steps", "0"], "steps: Input should be greater than or equal to 1, got '0'"),
        (["--rewards", "["], "rewards: expected JSON"),
        (["--rollout.stop", '["a'], "rollout.stop: expected a,b or a JSON list"),
        (["--prompts.template", "x"], "prompts.template: expected name=value,name=value"),
        (["more.yaml"], "unexpected arguments: more.yaml"),
        (["--policy", "distilgpt2"], "policy is a section of settings; did you mean policy.model?"),
    ],
)
def test_flags_that_cannot_be_used(capsys: pytest.CaptureFixture[str], recipe: Path, flags: list[str], expected: str):
    code, line = fails(capsys, "train", recipe, *flags)
    assert code == 2
    assert expected in line
    assert "command line" in line


def test_nothing_given(capsys: pytest.CaptureFixture[str]):
    code, line = fails(capsys, "train")
    assert code == 2
    assert line == "keel: error: no settings given -> keel train RUN.yaml, or see keel train --help"


def test_no_such_model(capsys: pytest.CaptureFixture[str], recipe: Path):
    code, line = fails(capsys, "train", recipe, "--policy.model", "./no-such-model")
    assert code == 2
    assert line.startswith("keel: error: ./no-such-model: ")


def test_model_folder_without_config(capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path):
    (tmp_path / "bare").mkdir()
    code, line = fails(capsys, "train", recipe, "--policy.model", tmp_path / "bare")
    assert code == 2
    assert f"{tmp_path}/bare: this folder has no config.json" in line


def test_missing_column(capsys: pytest.CaptureFixture[str], recipe: Path):
    code, line = fails(capsys, "train", recipe, "--prompts.column", "promt")
    assert code == 2
    assert "prompts.jsonl:1: no column \"promt\"; did you mean 'prompt'?" in line


def test_empty_data(capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path):
    (tmp_path / "prompts.jsonl").write_text("")
    code, line = fails(capsys, "train", recipe)
    assert code == 2
    assert "prompts.jsonl: the file has no rows" in line


@pytest.mark.parametrize(
    ("body", "code", "expected"),
    [
        ("return [1.0] * (len(completions) - 1)", 4, "longer"),
        ("return [float('nan')] * len(completions)", 4, "longer"),
        ("raise OSError('no such lexicon')", 4, "OSError: no such lexicon"),
    ],
)
def test_a_scorer_that_fails(
    capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path, body: str, code: int, expected: str
):
    (tmp_path / "rewards.py").write_text(f"def longer(completions, **columns):\n    {body}\n")
    found, line = fails(capsys, "train", recipe)
    assert found == code
    assert expected in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_train_resume_sample_evaluate(capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path):
    assert cli.main(["train", str(recipe), "--json", "--algorithm.kl_coef", "0.1"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["objective/kl_coef"] == 0.1
    assert "objective/kl" in captured.err
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["algorithm"]["kl_coef"] == 0.1

    code, line = fails(capsys, "train", recipe)
    assert code == 2
    assert "already holds a run -> add --resume, or choose another output" in line
    code, line = fails(capsys, "train", recipe, "--resume")
    assert code == 2
    assert "algorithm.kl_coef was 0.1, is 0.05" in line
    assert cli.main(["train", str(recipe), "--resume", "--algorithm.kl-coef", "0.1", "--steps", "3"]) == 0
    steps = [json.loads(row)["step"] for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    capsys.readouterr()

    policy, prompts = str(tmp_path / "run" / "policy"), str(tmp_path / "prompts.jsonl")
    common = ["--prompts.path", prompts, "--sampling.max-response-tokens", "4", "--sampling.num-responses", "2"]
    answers = tmp_path / "answers.jsonl"
    assert cli.main(["sample", "--model", policy, "--output", str(answers), *common]) == 0
    assert f"4 responses to 2 prompts: {answers}" in capsys.readouterr().out
    start = yaml.safe_load(recipe.read_text())["policy"]["model"]
    scorer = json.dumps({"function": f"{tmp_path / 'rewards.py'}:longer"})
    assert cli.main(["evaluate", "--policy", policy, "--against", start, "--rewards", scorer, *common]) == 0
    out = capsys.readouterr().out
    assert "win rate" in out
    assert "reference_logprob" in out


def test_check_starts_nothing(capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path):
    assert cli.main(["train", str(recipe), "--check"]) == 0
    assert "self-check passed" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


# ---- what goes wrong later -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("no", "a.yaml", "yes"), 2, "error: a.yaml: no -> yes"),
        (DataError("no"), 2, "error: no"),
        (Diverged("loss is nan"), 3, "error: loss is nan"),
        (RewardError("refused"), 4, "error: refused"),
        (CheckpointError("full", "x"), 5, "error: x: full"),
        (OSError(28, "No space left on device", "x"), 5, "error: x: No space left on device -> free or repair"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "error: out of memory -> end other programs"),
        (ImportError("x.so: cannot map: Cannot allocate memory"), 1, "error: out of memory -> end other programs"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 1, "error: out of memory: Default"),
        (KeyError("a\nb"), 1, "unexpected KeyError: 'a\\nb'; run again with --debug to see where"),
        (FileNotFoundError(2, "No such file", "x"), 1, "unexpected FileNotFoundError"),
        (type("PanicException", (BaseException,), {})("index"), 1, "unexpected PanicException: index; run again"),
    ],
)
def test_exit_codes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
):
    def run(verb: str, arguments: list[str]) -> None:
        raise error

    monkeypatch.setattr(cli, "_run", run)
    found, shown = fails(capsys, "train")
    assert found == code
    assert shown.startswith(f"keel: {line}")
    assert cli.main(["train", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_a_plain_file_name_is_the_setting_it_stands_for_wherever_it_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    rows, settings = str(tmp_path / "rows.jsonl"), tmp_path / "check.yaml"
    settings.write_text(f"path: {rows}\n")
    for arguments in (
        ["data", "check", rows],
        ["data", "check", "--split", "x", rows],
        ["data", "check", str(settings)],
    ):
        assert cli.main(arguments) == 0
        assert "1, all can be used" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "human"),
    [
        (["--human"], True),
        (["--human", "--seed", "3"], True),
        (["--seed", "3", "--human"], True),
        (["--human", "true"], True),
        (["--human", "false"], False),
        (["--human=false"], False),
        ([], False),
    ],
)
def test_a_yes_or_no_setting_may_stand_alone(arguments: list[str], human: bool):
    assert read_command(Verb("quickstart", QuickstartConfig), arguments).settings.human is human


def test_what_follows_a_lone_yes_is_not_its_value():
    command = read_command(Verb("rank", RankConfig, positional="answers"), ["--public", "answers.jsonl", "--aggregate"])
    assert (command.settings.public, command.settings.answers, command.settings.aggregate) == (
        True,
        "answers.jsonl",
        True,
    )


def test_a_list_of_texts_may_be_json():
    given = ["--model", "m", "--prompts.path", "p", "--prompts.chat", "--sampling.stop", '["\\n", "a, b"]']
    verb = Verb("sample", SampleConfig)
    settings = read_command(verb, given).settings
    assert settings.sampling.stop == ["\n", "a, b"]
    assert settings.prompts.chat is True
    assert read_command(verb, [*given[:-1], "x,y"]).settings.sampling.stop == ["x", "y"]


@pytest.mark.parametrize(("before", "after"), [(None, "10000"), ("7", "7")])
def test_waiting_threads_sleep_soon_unless_the_environment_says_how_long(
    monkeypatch: pytest.MonkeyPatch, before: str | None, after: str
) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if before is not None:
        monkeypatch.setenv("GOMP_SPINCOUNT", before)
    assert cli.main(["--help"]) == 0
    assert os.environ["GOMP_SPINCOUNT"] == after
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
