"""Help of the verbs: the main settings in --help, every setting in --help-all, within the width of the terminal."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from keel import config
from keel.cli import main as cli
from keel.cli.help import type_name

CLASSES: dict[str, type[config.Settings]] = {
    "quickstart": config.QuickstartConfig,
    "sft": config.SftConfig,
    "sample": config.SampleConfig,
    "rank": config.RankConfig,
    "data": config.DataCheckConfig,
    "reward": config.RewardConfig,
    "dpo": config.DpoConfig,
    "train": config.TrainConfig,
    "plan": config.PlanConfig,
    "evaluate": config.EvaluateConfig,
    "doctor": config.DoctorConfig,
    "report": config.ReportConfig,
    "serve": config.ServeConfig,
    "drift": config.DriftConfig,
    "serve-reward": config.ServeRewardConfig,
}
NOT_SETTINGS = {"resume", "check", "stats", "json", "debug", "help", "help-all"}
SHORT_FORMS = {"reward-model", "reward-function"}
MANY = 14
"""A verb with more settings than this has main settings; the help of the others shows all of them."""


def help_of(capsys: pytest.CaptureFixture[str], verb: str, flag: str) -> str:
    with pytest.raises(SystemExit) as done:
        cli.main([verb, flag])
    assert done.value.code == 0
    return capsys.readouterr().out


def flags_of(text: str) -> list[str]:
    """Flags at the beginning of a line, in their order, without dashes."""
    return [flag for flag in re.findall(r"^  (?:-h, )?--([\w.-]+)", text, re.MULTILINE) if flag not in NOT_SETTINGS]


def as_flags(names: Any) -> Iterator[str]:
    for name in names:
        yield name.replace("_", "-")
        if name == "rewards":
            yield from ("reward-model", "reward-function")


def test_every_verb_is_tested() -> None:
    assert list(CLASSES) == list(cli.VERBS)


@pytest.mark.parametrize("verb", CLASSES)
def test_main_settings_exist_and_hold_what_is_required(verb: str) -> None:
    settings = CLASSES[verb]
    names, known = settings.main_settings, list(config.setting_names(settings))
    assert len(names) == len(set(names))
    assert sorted(set(names) - set(known)) == []
    assert bool(names) == (len(known) > MANY)
    if names:
        assert 8 <= len(names) <= MANY
        assert {name for name, field in settings.model_fields.items() if field.is_required()} <= {
            name.partition(".")[0] for name in names
        }


@pytest.mark.parametrize("verb", CLASSES)
def test_help_lists_the_main_settings_and_names_help_all(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = CLASSES[verb]
    text = help_of(capsys, verb, "--help")
    assert help_of(capsys, verb, "-h") == text
    known = list(config.setting_names(settings))
    if settings.main_settings:
        assert flags_of(text) == list(as_flags(settings.main_settings))
        assert text.splitlines()[-1] == f"keel {verb} --help-all shows all {len(known)} settings."
    else:
        assert sorted(flags_of(text)) == sorted(as_flags(known))
        assert "--help-all" in text.splitlines()[-1]
    assert text.count("\n\n") <= 5, "one sentence, an example, settings, options"


@pytest.mark.parametrize("verb", CLASSES)
def test_help_all_lists_every_setting(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, verb, "--help-all")
    assert sorted(flags_of(text)) == sorted(as_flags(config.setting_names(CLASSES[verb])))
    if verb != "data":  # which has a word between itself and its flags
        assert help_of(capsys, verb, "--help_all") == text


@pytest.mark.parametrize("columns", ["80", "120", "200"])
@pytest.mark.parametrize("verb", CLASSES)
def test_help_fits_the_terminal(
    verb: str, columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    for flag in ("--help", "--help-all"):
        lines = [line.rstrip() for line in help_of(capsys, verb, flag).splitlines()]
        too_long = [line for line in lines if len(line) > min(120, int(columns))]
        assert [line for line in too_long if not line.startswith("  keel ")] == []  # an example is never broken
        assert [line for line in too_long if len(line) > 90] == []


def test_help_shows_defaults_and_what_is_required(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    text = " ".join(help_of(capsys, "train", "--help-all").split())
    for part in (
        "--output str Run folder (required)",
        "--algorithm.kl-coef float",
        "(default: 0.05)",
        "(default: false)",
        "--rewards JSON",
        "--prompts.template name=value,...",
        "--policy.lora.target-modules list[str]|all-linear",
    ):
        assert part in text, part
    assert "None" not in text
    assert "(default: )" not in text


def test_a_setting_of_a_section_that_may_be_left_out_is_not_called_required(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(help_of(capsys, "drift", "--help").split())
    assert re.search(r"--run str [^-]*\(required\)", text)
    assert not re.search(r"--prompts\.path str [^-]*\(required\)", text)


def test_retired_words_are_in_no_help_text() -> None:
    retired = re.compile(r"\b(answers?|told|says?|said|figures?|judged?|stands?|lies|whole|own|apart|mend)\b")
    texts = {
        f"{verb}: {name}": field.description or ""
        for verb, settings in CLASSES.items()
        for name, field in settings.model_fields.items()
    }
    plain = {name: re.sub(r"`[^`]*`", "", text) for name, text in texts.items()}  # names of settings are quoted
    assert {name: text for name, text in plain.items() if retired.search(text)} == {}


@pytest.mark.parametrize(
    ("annotation", "name"),
    [
        (int, "int"),
        (str | None, "str"),
        (list[str], "list[str]"),
        (dict[str, float], "name=value,..."),
        (config.TrainConfig.model_fields["doctor"].annotation, "{quiet,tell,stop}"),
        (config.TrainConfig.model_fields["rewards"].annotation, "JSON"),
        (config.AlgorithmSettings.model_fields["dual_clip"].annotation, "float"),
        (config.LogSettings.model_fields["trackers"].annotation, "list[tensorboard]"),
    ],
)
def test_type_names(annotation: Any, name: str) -> None:
    assert type_name(annotation) == name
