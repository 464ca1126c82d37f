"""docs/reference/settings.md: every setting of every verb, with a link to its explanation in docs/config.md."""

import re
from collections.abc import Iterator
from functools import cache

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from keel import config
from keel.cli.help import default_text, list_sections, type_name

from . import DOCS
from .markdown import anchor, escape, table

SUPERVISED, RESPONSES = "keel sft, keel reward and keel dpo", "keel sample and keel evaluate"
EXPLANATIONS: dict[type[BaseModel], list[str]] = {
    config.QuickstartConfig: ["keel quickstart"],
    config.SftConfig: [SUPERVISED, "keel sft alone"],
    config.SampleConfig: [RESPONSES, "keel sample alone"],
    config.RankConfig: ["keel rank"],
    config.DataCheckConfig: ["keel data check"],
    config.RewardConfig: [SUPERVISED, "keel reward alone"],
    config.DpoConfig: [SUPERVISED, "keel dpo alone"],
    config.TrainConfig: ["keel train"],
    config.PlanConfig: ["keel train", "keel plan alone"],
    config.EvaluateConfig: [RESPONSES, "keel evaluate alone"],
    config.DoctorConfig: ["keel doctor"],
    config.ReportConfig: ["keel report"],
    config.ServeConfig: ["keel serve"],
    config.DriftConfig: ["keel drift"],
    config.ServeRewardConfig: ["keel serve-reward"],
    config.RewardSource: ["A scorer"],
}
"""config class -> sections of docs/config.md that explain its settings; a later section takes precedence"""

INTRODUCTION = """
# All settings

Every setting of every command: its name in a YAML file, its type, its default and its meaning. As a flag, a setting is
`--name value`. The name links to the explanation of its default.

A list of texts is written on the command line as `a,b` or as a JSON list, a mapping as `name=value,name=value`. `null`
unsets a setting. An empty default is explained in the meaning.
"""


def page() -> str:
    """Return the text of the page."""
    return "\n\n".join(
        [INTRODUCTION.strip(), *(text for settings in EXPLANATIONS for text in _class_section(settings))]
    )


def row(settings: type[BaseModel], name: str, field: FieldInfo, optional: bool) -> list[str]:
    """Return the cells of a setting: name, type, default, meaning."""
    explained = explanations()[settings].get(name)
    link = f"[`{name}`](../config.md#{explained})" if explained else f"`{name}`"
    default = default_text(field, optional)
    shown = default if default in ("", "required") else f"`{default}`"
    return [link, f"`{type_name(field.annotation)}`", shown, escape(" ".join((field.description or "").split()))]


@cache
def explanations() -> dict[type[BaseModel], dict[str, str]]:
    """Return config class -> setting -> anchor of the heading in docs/config.md below which the setting has a row."""
    anchors: dict[str, dict[str, str]] = {}
    section = heading = ""
    for line in (DOCS / "config.md").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"(##+) (.+)", line):
            heading = found[2]
            section = heading if found[1] == "##" else section
        elif found := re.match(r"\| `([\w.]+)` \|", line):
            anchors.setdefault(section, {})[found[1]] = anchor(heading)
    return {
        settings: {name: place for title in titles for name, place in anchors.get(title, {}).items()}
        for settings, titles in EXPLANATIONS.items()
    }


def _class_section(settings: type[BaseModel]) -> Iterator[str]:
    """Yield the heading and the tables of a config class."""
    if settings is config.RewardSource:
        yield "## A scorer"
        yield "The keys of each entry of `rewards`, for `keel train`, `keel plan` and `keel evaluate`."
    else:
        yield f"## {_verb_name(settings)}"
    for section in list_sections(settings):
        if section.name:
            yield f"**`{section.name}`**" + (f": {escape(' '.join(section.about.split()))}" if section.about else "")
        rows = [row(settings, name, field, section.optional) for name, field in section.fields.items()]
        if rows:
            yield table(["setting", "type", "default", "meaning"], rows)


def _verb_name(settings: type[BaseModel]) -> str:
    return EXPLANATIONS[settings][-1].removesuffix(" alone")
