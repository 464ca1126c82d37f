"""Read HTML pages in tests; a finding to show on them, and a run in which every text is hostile."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from keel.diagnosis.findings import Cause, Change, Evidence, Finding

from .written import COLUMNS, answer, settings, write_run

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028<!--{{ 7*7 }}"
FINDING = Finding(
    name="kl-runaway",
    title="The policy runs away from the reference.",
    severity="critical",
    stage="update",
    first_step=4,
    last_step=None,
    evidence=(Evidence("objective/kl", "0 at first, 9 now"), Evidence("not/there", "never measured")),
    causes=(
        Cause(
            "the KL holds the policy too weakly",
            ("kl_coef is 0.05",),
            ("the score still rises",),
            Change("algorithm.kl_coef", "0.15"),
        ),
        Cause("a person must look", (), (), Change("", "read the answers")),
    ),
)
INLINE = {"a", "b", "code", "del", "ins", "span"}


class Reader(HTMLParser):
    """The tags of a page, and its text without styles and scripts and with single spaces."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in INLINE:
            self.texts.append(" ")

    def handle_data(self, data: str) -> None:
        inside = self.tags[-1][0] if self.tags else ""
        if inside == "script":
            self.scripts.append(data)
        elif inside != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[0])

    def where(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
        return [found for name, found in self.tags if name == tag and wanted.items() <= found.items()]


def hostile_run(folder: Path) -> Path:
    """Write a run in which names, responses, prompts, pieces, settings, metrics and machine are hostile text."""
    rows = [answer(step, HOSTILE + "?", HOSTILE * step, float(step), kl=step / 2) for step in (1, 2, 6)]
    rows += [answer(6, [{"role": HOSTILE, "content": HOSTILE}], "\ud800 lone", 0.0, pieces=[HOSTILE, "\ud800"])]
    given = settings(policy__model=HOSTILE) | {"strange": {HOSTILE: HOSTILE}}
    columns = COLUMNS | {f"rewards/{HOSTILE}": [1.0, 2.0, 3.0, 4.0, 5.0, 7.0], HOSTILE: [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]}
    began = {"inputs": {HOSTILE: HOSTILE}, "machine": {HOSTILE: HOSTILE}}
    return write_run(folder, given, columns, rows, began)
