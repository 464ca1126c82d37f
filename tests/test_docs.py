"""The documents say what the code does: every setting with its default, every metric that a run writes."""

import json
import re
import runpy
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from keel import config, failpoints
from keel.cli.main import main

from .documented import python_blocks, written_blocks
from .reference import list_outdated
from .reference.metrics import defined_keys, descriptions
from .reference.settings import EXPLANATIONS

DOCS = Path(__file__).parents[1] / "docs"


def documented(sections: list[str]) -> dict[str, str]:
    """Setting -> default, from the tables of these sections of docs/config.md."""
    parts = re.split(r"^## (.+)$", (DOCS / "config.md").read_text(), flags=re.MULTILINE)
    texts = dict(zip(parts[1::2], parts[2::2], strict=True))
    found: dict[str, str] = {}
    for section in sections:  # a verb's own section has the last word over what it shares with others
        rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \| .+ \|$", texts[section], re.MULTILINE)
        assert len(rows) == len({name for name, _ in rows}), f"a setting has two rows in {section}"
        found |= dict(rows)
    return found


def inner_settings(annotation: Any) -> type[BaseModel] | None:
    options = [annotation, *get_args(annotation)]
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)


def default_of(settings: type[BaseModel], name: str) -> Any:
    """The default of a dotted setting; PydanticUndefined when it must be given."""
    first, _, rest = name.partition(".")
    field = settings.model_fields[first]
    if not rest:
        return field.default
    if isinstance(field.default, BaseModel):
        value: Any = field.default
        for part in rest.split("."):
            value = getattr(value, part)
        return value
    inner = inner_settings(field.annotation)
    assert inner is not None
    return default_of(inner, rest)


def same(text: str, default: Any) -> bool:
    if default is PydanticUndefined or default is None:
        return text == ("none" if default is None else "required")
    if isinstance(default, float):
        return float(text) == default
    return text == default or yaml.safe_load(text) == (list(default) if isinstance(default, tuple) else default)


@pytest.mark.parametrize("settings", EXPLANATIONS, ids=lambda settings: settings.__name__)
def test_every_setting_is_documented_with_its_default(settings: type[BaseModel]):
    found, known = documented(EXPLANATIONS[settings]), list(config.setting_names(settings))
    assert sorted(set(known) - set(found)) == [], "not in docs/config.md"
    assert sorted(set(found) - set(known)) == [], "in docs/config.md, but no setting"
    wrong = {name: default_of(settings, name) for name in known if not same(found[name], default_of(settings, name))}
    assert wrong == {}, "docs/config.md gives another default"


@pytest.mark.parametrize("settings", EXPLANATIONS, ids=lambda settings: settings.__name__)
def test_every_setting_has_a_help_line(settings: type[BaseModel]):
    def without_help(owner: type[BaseModel]) -> Iterator[str]:
        for name, field in owner.model_fields.items():
            inner = inner_settings(field.annotation)
            if inner is not None:
                yield from without_help(inner)
            elif not field.description:
                yield name

    assert list(without_help(settings)) == []


@pytest.mark.parametrize("settings", EXPLANATIONS, ids=lambda settings: settings.__name__)
def test_one_setting_of_a_section_leaves_the_others_as_they_are(settings: type[BaseModel]):
    """A section's defaults are those of its class: else they would be lost as soon as one of it is given."""
    sections = {name: field.default for name, field in settings.model_fields.items()}
    found = {name: default for name, default in sections.items() if isinstance(default, BaseModel)}
    assert {name: default for name, default in found.items() if default != type(default)()} == {}


# ---- metrics ---------------------------------------------------------------------------------------------------------

RUNS = {
    "ppo": ["train", "--algorithm.name", "ppo", "--reward.normalize", "running", "--algorithm.entropy-coef", "0.01"],
    "shared": ["train", "--critic.sharing", "shared", "--algorithm.kl-in", "loss", "--algorithm.target-kl", "1"],
    "grpo": ["train", "--algorithm.name", "grpo", "--algorithm.max-approx-kl", "0.1"],
    "sft": ["sft"],
    "reward": ["reward"],
    "patient": ["reward", "--patience", "1"],
    "dpo": ["dpo", "--patience", "1"],
}


def metrics_of(run: str, model: Path, folder: Path) -> set[str]:
    """Keys of metrics.jsonl after a tiny run."""
    (folder / "f.py").write_text("def f(completions, **columns):\n    return [float(len(c)) for c in completions]\n")
    rows = [{"prompt": f"w{i}", "completion": "w2 w3", "chosen": "w2 w3", "rejected": "w4"} for i in range(8)]
    drop = ("chosen", "rejected") if run == "sft" else ("completion",) if RUNS[run][0] in ("reward", "dpo") else ()
    kept = [{key: value for key, value in row.items() if key not in drop} for row in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    output, data = str(folder / "run"), str(folder / "rows.jsonl")
    if RUNS[run][0] == "train":
        more = ["--policy.model", str(model), "--prompts.path", data, "--prompts.max-tokens", "8", "--steps", "2"]
        more += ["--rollout.batch-size", "8", "--rollout.max-response-tokens", "5"]
        more += ["--rewards", json.dumps({"function": f"{folder / 'f.py'}:f"})]
    else:
        more = ["--model", str(model), "--data.path", data, "--data.eval-fraction", "0.25", "--max-tokens", "16"]
    assert main([*RUNS[run], "--output", output, *more]) == 0
    return {key for line in (folder / "run" / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}


@pytest.mark.parametrize("run", RUNS)
def test_every_metric_is_documented(run: str, tiny_policy: Path, tmp_path: Path):
    known = set(re.findall(r"`([a-z_]+(?:/[\w<>*]+)?)`", (DOCS / "metrics.md").read_text()))
    assert "objective/kl" in known
    found = metrics_of(run, tiny_policy, tmp_path) - {"step"}
    by_scorer = {
        key for key in found if key.startswith(("rewards/", "spread/", "agreement/"))
    }  # one for each scorer, under its name
    assert sorted(found - by_scorer - known) == [], "not in docs/metrics.md"
    assert not by_scorer or "rewards/NAME" in known


def test_every_described_metric_is_defined_and_the_other_way_round() -> None:
    """docs/metrics.md, and the descriptions that reports show, from which docs/reference/metrics.md is generated."""
    patterns, defined = {key for group in descriptions().values() for key in group}, defined_keys()
    undescribed = {key for key in defined if not any(fnmatchcase(key, pattern) for pattern in patterns)}
    assert undescribed == {"progress/responses"}, "a count of what was done has no curve"
    assert {pattern for pattern in patterns if not any(fnmatchcase(key, pattern) for key in defined)} == set()


def test_the_generated_pages_of_the_reference_are_up_to_date() -> None:
    assert list_outdated() == [], "run: make reference"


def test_the_type_checker_reads_every_python_block() -> None:
    """After a change of a block: `python -m tests.documented`."""
    assert written_blocks() == python_blocks()
    assert "readme_1.py" in python_blocks()


def test_the_readme_is_short() -> None:
    assert len((DOCS.parent / "README.md").read_text().split()) < 900


def links() -> list[tuple[Path, str]]:
    """Page and target of each link to a file."""
    pages = [*DOCS.parent.glob("*.md"), *DOCS.rglob("*.md"), *(DOCS.parent / "examples").rglob("*.md")]
    found = [(page, target) for page in pages for target in re.findall(r"\]\(([^)\s#]+)", page.read_text())]
    return [(page, target) for page, target in found if "://" not in target]


def test_every_link_leads_to_a_file() -> None:
    """`make docs` finds broken links within the site, with their anchors; the other pages are read as they are."""
    generated = {DOCS / "contributing.md", DOCS / "changelog.md"}
    broken = [
        (page.name, target)
        for page, target in links()
        if not (page.parent / target).exists() and (page.parent / target).resolve() not in generated
    ]
    assert broken == []


def test_every_page_is_in_the_navigation() -> None:
    navigation = (DOCS.parent / "mkdocs.yml").read_text()
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert [page for page in pages if f": {page}" not in navigation and f"- {page}" not in navigation] == []


def test_the_picture_of_the_pipeline_is_what_its_script_draws() -> None:
    drawn = runpy.run_path(str(DOCS / "site" / "pipeline.py"))["picture"]()
    assert (DOCS / "images" / "pipeline.svg").read_text() == drawn


def test_every_failpoint_is_documented() -> None:
    rows = re.findall(r"^\| `([a-z]+\.[a-z]+)` \| (.+) \|$", (DOCS / "reliability.md").read_text(), re.MULTILINE)
    assert dict(rows) == failpoints.NAMES


def test_every_fault_has_its_row() -> None:
    text = (DOCS / "faults.md").read_text()
    cells = [cell for line in text.splitlines() if line.startswith("| F-") for cell in [line.split("|")[1]]]
    named: set[int] = set()
    for cell in cells:
        for part in cell.split(","):
            first, *last = (int(number) for number in re.findall(r"F-(\d\d)", part))
            named |= set(range(first, (last or [first])[0] + 1))
    assert named == set(range(1, 62))
