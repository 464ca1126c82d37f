"""docs/reference/metrics.md: every metric of metrics.jsonl, from the descriptions that reports and pages show."""

import re

import yaml

from . import DOCS, ROOT
from .markdown import escape, table

DESCRIPTIONS = ROOT / "src" / "keel" / "run" / "read" / "metric_descriptions.yaml"
INTRODUCTION = """
# All metrics

The keys of `metrics.jsonl`, in the groups and with the words of the reports and of `keel serve`. `*` stands for the
name of a scorer or of a metric, or for `sft`, `reward` or `dpo`. [Metrics](../metrics.md) has the definitions, how to
read each, and its name in TRL, OpenRLHF and verl.
"""


def page() -> str:
    """Return the text of the page."""
    parts = [INTRODUCTION.strip()]
    for title, metrics in descriptions().items():
        rows = [
            [f"`{key}`", escape(label.replace("{}", "`*`")), escape(text)] for key, (label, text) in metrics.items()
        ]
        parts += [f"## {title}", table(["key", "label", "meaning"], rows)]
    return "\n\n".join(parts)


def descriptions() -> dict[str, dict[str, list[str]]]:
    """Return title of a group -> key -> label and meaning."""
    groups: dict[str, dict[str, list[str]]] = yaml.safe_load(DESCRIPTIONS.read_text(encoding="utf-8"))
    return groups


def defined_keys() -> set[str]:
    """Return the keys of metrics.jsonl that docs/metrics.md defines, with `*` for a name."""
    text = (DOCS / "metrics.md").read_text(encoding="utf-8")
    first_cells = re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE)
    keys = {key for cell in first_cells for key in re.findall(r"`([a-z_]+/[\w/@]+)`", cell)}
    return {key.replace("NAME", "*") for key in keys if not key.startswith("check/")}  # of `keel train --check`
