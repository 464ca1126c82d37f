"""What leaves the store is what the raters said, and comes back as it was."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from keel.cli.ratings import print_stats, write_export
from keel.data.preferences import Ranking, load_rankings
from keel.errors import ConfigError
from keel.ranking.agreement import summary
from keel.ranking.export import csv_table, export, json_lines, ranking_row
from keel.terminal import literal

from .judged import item, judged

CHAT = [{"role": "user", "content": "Hi\nthere"}]
TEXTS = replace(item(1, "icy", "wa\u0085rm", 'chi"lly\u2028', prompt="A word for cold?"), source="policy-a")
CHATS = replace(item(2, "Hello", "What?"), prompt=CHAT)
JUDGED = [
    judged(TEXTS, "anna", (1, 3, 1), comment="both fit", tags=("short", "odd")),
    judged(TEXTS, "ben", (1, 2, None)),
    judged(CHATS, "anna", (2, 1)),
    judged(CHATS, "ben", None),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_a_row_for_each_ranking_with_its_raters_weight(path: Path):
    counts = write_export(JUDGED, str(path), "rankings", aggregate=False)
    assert counts == {"rows": 3, "items": 2, "raters": 2, "rankings": 3, "cannot_judge": 1}
    first, second, third = (json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1])
    assert first | {"weight": 0} == {
        "prompt": "A word for cold?",
        "responses": ["icy", "wa\u0085rm", 'chi"lly\u2028'],
        "ranks": [1, 3, 1],
        "rater": "anna",
        "weight": 0,
        "source": "policy-a",
        "comment": "both fit",
        "tags": ["short", "odd"],
    }
    assert (second["ranks"], second["rater"], third["prompt"]) == ([1, 2, None], "ben", CHAT)
    assert first["weight"] == third["weight"]
    assert (first["weight"] + second["weight"]) / 2 == pytest.approx(1.0, abs=1e-4)


def test_what_is_exported_is_what_is_read(path: Path):
    write_export(JUDGED, str(path), "rankings", aggregate=False)
    read = load_rankings(str(path))
    weight = read[0].weight
    assert read == [
        Ranking("A word for cold?", TEXTS.responses, (1, 3, 1), weight=weight, rater="anna", source="policy-a"),
        Ranking(
            "A word for cold?", TEXTS.responses, (1, 2, None), weight=read[1].weight, rater="ben", source="policy-a"
        ),
        Ranking(CHAT, ("Hello", "What?"), (2, 1), weight=weight, rater="anna"),
    ]


def test_a_row_for_each_pair_told_apart(path: Path):
    assert write_export(JUDGED, str(path), "pairs", aggregate=False)["rows"] == 4
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [(row["chosen"], row["rejected"], row["rater"]) for row in rows[:3]] == [
        ("icy", "wa\u0085rm", "anna"),
        ('chi"lly\u2028', "wa\u0085rm", "anna"),
        ("icy", "wa\u0085rm", "ben"),
    ]
    assert rows[3]["chosen"] == [{"role": "assistant", "content": "What?"}]  # TRL's form of a chat
    assert load_rankings(str(path))[3].prompt == CHAT
    assert load_rankings(str(path))[3].responses == ("What?", "Hello")


def test_one_consensus_for_each_item(path: Path):
    third = item(3, "x", "y")
    more = [*JUDGED, judged(third, "anna", (1, 2)), judged(third, "ben", (2, 1)), judged(third, "cleo", (2, 1))]
    write_export(more, str(path), "rankings", aggregate=True)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [(row["ranks"], row["raters"]) for row in rows] == [([1, 3, 2], 2), ([2, 1], 1), ([2, 1], 3)]
    assert write_export(more, str(path), "pairs", aggregate=True)["rows"] == 5
    assert load_rankings(str(path))[-1].responses == ("y", "x")


def test_raters_who_cancel_each_other_out_give_a_tie_and_no_pair():
    one = item(1, "x", "y")
    even = [judged(one, "anna", (1, 2)), judged(one, "ben", (2, 1))]
    assert export(even, "rankings", aggregate=True)[0][0]["ranks"] == [1, 1]
    assert export(even, "pairs", aggregate=True)[0] == []


def test_nobody_ranked_anything(path: Path):
    counts = write_export([judged(TEXTS, "anna", None)], str(path), "rankings", aggregate=True)
    assert counts == {"rows": 0, "items": 0, "raters": 0, "rankings": 0, "cannot_judge": 1}
    assert path.read_text() == ""


def test_only_known_kinds_of_file_are_written(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"neither in \.jsonl nor in \.csv"):
        write_export(JUDGED, str(tmp_path / "out.xlsx"), "rankings", aggregate=False)
    assert list(tmp_path.iterdir()) == []


# ---- F-36: what a text may do where it is shown ----------------------------------------------------------------------

FORMULAS = [
    "=1+1", "=HYPERLINK(\"http://evil\",\"x\")", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "=cmd|' /C calc'!A0",
    "-2+3+cmd|' /C calc'!A0", "@import", "+44 20", "=\u0000", "-", "=", "+\ud7ff",
]  # fmt: skip
HARMLESS = ["a=1", " =1", "'quoted", "1-1", "", "\u00e9", "a,b", 'a"b', "a\nb", "ends\r"]


def cells(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text.removeprefix("\ufeff"), newline="")))


@pytest.mark.parametrize("text", FORMULAS)
def test_f36_no_cell_is_a_formula(text: str):
    one = replace(item(1, text, "other", prompt=text), source=text)
    rows = [judged(one, text, (1, 2), comment=text, tags=(text,))]
    for form in ("rankings", "pairs"):
        for row in cells(csv_table(export(rows, form, aggregate=False)[0])):
            assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) for cell in row.values())
            assert list(row.values()).count(f"'{text}") == (6 if form == "rankings" else 4)
    assert export(rows, "pairs", aggregate=False)[0][0]["chosen"] == text  # JSON lines stay exact


@pytest.mark.parametrize("text", HARMLESS)
def test_f36_other_texts_are_as_they_were(text: str):
    one = item(1, text, "other")
    [row] = cells(csv_table(export([judged(one, "anna", (1, 2))], "rankings", aggregate=False)[0]))
    assert row["responses 1"] == text


def test_a_table_has_a_column_for_each_answer_of_the_widest_item():
    rows = [judged(item(1, "x", "y"), "anna", (1, 2)), judged(item(2, "x", "y", "z"), "anna", (1, 2, 3))]
    table = cells(csv_table(export(rows, "rankings", aggregate=False)[0]))
    names = ["prompt", "responses 1", "responses 2", "responses 3", "ranks 1", "ranks 2", "ranks 3", "rater", "weight"]
    assert list(table[0]) == [*names, "source", "comment", "tags"]
    assert (table[0]["responses 3"], table[0]["ranks 3"], table[1]["ranks 3"]) == ("", "", "3")


def test_f36_nothing_steers_the_terminal(capsys: pytest.CaptureFixture[str]):
    evil = "a\x1b[31mred\x1b]0;title\x07\x9b2J\r\u202egnp.exe\x00[bold]:smile:"
    one = item(1, evil, "b", prompt=evil)
    rows = [judged(one, evil, (1, 2)), judged(one, "ben", (2, 1))]
    print_stats(summary(rows, [one], [evil, "ben"], 2))
    shown = capsys.readouterr().out
    assert not any(c in shown for c in "\x1b\x07\x9b\r\u202e\x00")
    assert r"a\x1b[31mred\x1b]0;title\x07\x9b2J\r\u202egnp.exe\x00[bold]:smile:" in shown


def test_what_is_only_writing_stays():
    assert literal("na\u00efve \u65e5\u672c\u3000\U0001f469\u200d\U0001f4bb\u00a0x") == (
        "na\u00efve \u65e5\u672c\u3000\U0001f469\u200d\U0001f4bb\u00a0x"
    )
    assert literal("two\nlines\u2028\ud800") == "two\\nlines\\u2028\\ud800"


def test_figures_fit_eighty_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    one, names = item(1, "long " * 100, "b", "c"), [f"somebody with a name {n}" for n in range(6)]
    rows = [judged(one, name, (1, 2, 3) if n % 2 else (3, 2, 1)) for n, name in enumerate(names)]
    print_stats(summary(rows, [one], names, 6))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for words in ("Krippendorff's alpha", "earlier", "weight", "somebody", "Most disagreement"):
        assert words in shown


# ---- keel's own rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ranking",
    [
        Ranking("p", ("a", "b"), (1, 2)),
        Ranking(CHAT, ("a", "b", "c"), (1, None, 2), weight=0.5, rater="anna", source="s"),
        Ranking("p", ("a", "b"), (1, 2), margin=2.0),
        Ranking("p", ("b", "a"), (2, 1), margin=0.5),
    ],
)
def test_a_ranking_written_is_a_ranking_read(ranking: Ranking, path: Path):
    path.write_text(json_lines([ranking_row(ranking)]), encoding="utf-8")
    [read] = load_rankings(str(path))
    assert read.ranked == ranking.ranked
