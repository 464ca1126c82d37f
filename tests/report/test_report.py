"""The report page: what it says of a small run, that it works on any run, and that texts stay texts."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from keel.cli.main import main
from keel.diagnosis.doctor import diagnose
from keel.diagnosis.findings import Diagnosis, Evidence, Finding
from keel.report.run_report import render_report, write_report
from keel.run.read.run import read_run

from ..diagnosis.pages import FINDING, HOSTILE, Reader, hostile_run
from ..diagnosis.written import answer, settings, write_run


def diagnosis_of(folder: Path, *findings: Finding) -> Diagnosis:
    return replace(diagnose(read_run(folder)), findings=findings)


def read_report(*folders: Path) -> Reader:
    target, _ = write_report([str(folder) for folder in folders], str(folders[0] / "out.html"))
    return Reader(target.read_text(encoding="utf-8"))


def test_the_page_begins_with_the_verdict(tmp_path: Path):
    folder = write_run(tmp_path / "small")
    run = read_run(folder)
    found = Reader(render_report([run], [diagnosis_of(folder, FINDING)]))
    assert "Critical since step 4: The policy runs away from the reference. keel train" in found.text
    assert "step 6 of 6, finished" in found.text
    assert "Score 0.250 \N{RIGHTWARDS ARROW} to 1.50" in found.text
    later = replace(FINDING, severity="notice", first_step=5, follows_from="kl-runaway")
    over = replace(FINDING, last_step=5)
    said = [
        Reader(render_report([run], [diagnosis_of(folder, *own)])).text
        for own in [(), (over,), (FINDING, later), (later,)]
    ]
    assert "No problems found at step 6." in said[0]
    assert "No problems found at step 6; 1 earlier finding is no longer open." in said[1]
    assert "Critical since step 4: The policy runs away from the reference (1 more finding)." in said[2]
    assert "Notice since step 5: The policy runs away from the reference, which follows from kl-runaway." in said[3]


def test_a_finding_is_told_with_its_evidence_causes_and_change(tmp_path: Path):
    folder = write_run(tmp_path / "small")
    found = Reader(render_report([read_run(folder)], [diagnosis_of(folder, FINDING)]))
    assert "critical kl-runaway update \N{MIDDLE DOT} since step 4" in found.text
    assert "objective/kl 0 at first, 9 now" in found.text
    assert "not/there never measured" in found.text
    assert "for kl_coef is 0.05 against the score still rises" in found.text
    assert "try algorithm.kl_coef: 0.15" in found.text
    assert "try read the answers" in found.text
    plots = [own["aria-label"] for own in found.where("svg", role="img")]
    assert "objective/kl, between 0 and 9, step 1 to 6" in plots
    assert not [label for label in plots if label and label.startswith("not/there")]
    spans = [(own["x"], own["width"]) for own in found.where("rect", class_="span")]
    assert spans == [("120.0", "80.0")]  # from step 4 of 1 to 6 to the end, in a plot 200 wide
    marks = {own["aria-label"].partition(".")[0]: own for own in found.where("div", data_plot="curve")}  # type: ignore[union-attr]
    places = {name: (int(own["data-group"]), int(own["data-curve"])) for name, own in marks.items()}  # type: ignore[arg-type]
    shown = {name: found.data["marks"][group][curve] for name, (group, curve) in places.items()}
    assert shown["KL to the reference"] == [{"run": 0, "first": 4, "last": 6, "severity": "critical", "shown": True}]
    assert shown["Score"][0]["shown"] is False


def test_the_page_says_what_its_run_is_worth(tmp_path: Path):
    found = read_report(write_run(tmp_path / "small"))
    assert found.where("title") == [{}]
    assert "small \N{MIDDLE DOT} keel report" in found.text
    assert "The score by the held-out gold was highest, 1.67, at 2.33 nats (step 4)" in found.text
    assert "Constant: Weight of the KL objective/kl_coef 0.05" in found.text
    assert "Largest gain Where is my drill?" in found.text
    assert found.where("ins")
    assert (
        "step 1 \N{MIDDLE DOT} score \N{MINUS SIGN}2 \N{MIDDLE DOT} KL 0 \N{MIDDLE DOT} 2 tokens who knows."
        in found.text
    )
    assert "rewards.1.weight 0.0 1.0" in found.text
    assert "policy.model base required" in found.text
    assert f"keel train {tmp_path}/small/config.yaml --output {tmp_path}/small-again" in found.text
    assert "Machine: device abacus; keel 0.1.0." in found.text
    assert "base " + "ab" * 32 in found.text
    assert found.data["tokens"][0]["rewards"] == [-0.025, 1.0]
    assert found.data["spread"][0]["score"]["steps"] == [3.33333]  # the mean of 1, 3 and 6


def test_several_runs_are_compared(tmp_path: Path):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", settings(algorithm__kl_coef=0.2))
    found = read_report(first, second, first)  # one named twice counts once
    assert "2 runs compared" in found.text
    assert "algorithm.kl_coef 0.05 0.2" in found.text
    assert "policy.model" not in found.text.partition("Settings Only settings that differ")[2].partition("Reproduce")[0]
    assert "The same prompt in each run" in found.text
    assert len(found.data["curves"][0][0]) == 2
    assert [len(panel["runs"]) for panel in found.data["frontier"]] == [2, 2, 2]
    assert found.data["names"] == ["a", "b"]


def test_the_contents_behind_equal_paths_are_compared(tmp_path: Path):
    other = {"inputs": {"base": "cd" * 32}, "machine": {"keel": "0.2.0"}}
    found = read_report(write_run(tmp_path / "a"), write_run(tmp_path / "b", began=other))
    assert "contents of base abababababab cdcdcdcdcdcd" in found.text
    assert "machine: keel 0.1.0 0.2.0" in found.text
    assert "machine: device" not in found.text


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path):
    runs = [write_run(tmp_path / name / "run") for name in ("a", "b")]
    assert read_report(*runs).data["names"] == [str(run) for run in runs]


@pytest.mark.parametrize("missing", ["rollouts.jsonl", "metrics.jsonl", "began.json", "ended.json"])
def test_a_missing_part_is_said_plainly(tmp_path: Path, missing: str):
    folder = write_run(tmp_path / "small")
    (folder / missing).unlink()
    said = {
        "rollouts.jsonl": [
            "this run logged no responses (log.rollouts_per_step)",
            "Nothing to compare",
            "Nothing to show",
        ],
        "metrics.jsonl": ["No diagnosis yet", "No step has been logged.", "never measured a KL"],
        "began.json": ["The run has no record of its inputs and its machine"],
        "ended.json": ["step 6 of 6, unknown"],
    }[missing]
    found = read_report(folder).text
    assert [sentence for sentence in said if sentence not in found] == []


def test_a_run_of_sft_has_a_report(tmp_path: Path):
    given = {"output": "x", "model": "base", "data": {"path": "rows.jsonl"}, "epochs": 2.0}
    columns = {"sft/loss": [3.0, 2.5, 2.0], "sft/eval_loss": [3.0, None, 2.5], "sft/rows_left_out": [4.0, None, None]}
    found = read_report(write_run(tmp_path / "sft", given, columns, answers=[]))
    assert "Held-out loss sft/eval_loss" in found.text
    assert "Loss 3 \N{RIGHTWARDS ARROW} to 2" in found.text
    assert "Rows left out sft/rows_left_out 4" in found.text
    assert "this run samples no responses" in found.text
    assert "epochs 2.0 1.0" in found.text
    assert "keel sft " in found.text


def test_the_report_of_a_reward_model_stays_and_is_pointed_to(tmp_path: Path):
    given = {"output": "x", "model": "base", "data": {"path": "rows.jsonl"}}
    folder = write_run(tmp_path / "reward", given, {"reward/loss": [0.7, 0.6], "reward/eval_accuracy": [0.5, 0.7]}, [])
    (folder / "report.html").write_text("its own")
    target, _ = write_report([str(folder)])
    assert target == folder / "run-report.html"
    assert (folder / "report.html").read_text() == "its own"
    assert Reader(target.read_text()).where("a", href="report.html")
    elsewhere, _ = write_report([str(folder)], str(tmp_path / "pages" / "r.html"))
    assert Reader(elsewhere.read_text()).where("a", href="../reward/report.html")


def test_a_run_that_is_being_written_has_a_report(tmp_path: Path):
    """The last lines are torn in the middle of a number and of a letter."""
    folder = write_run(tmp_path / "small")
    (folder / "ended.json").unlink()
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 7, "objective/scores": 1.')
    with (folder / "rollouts.jsonl").open("ab") as file:
        file.write(json.dumps(answer(7, "Thank you!", "ü", 1.0), ensure_ascii=False).encode()[:-200])
    found = read_report(folder)
    assert "step 6 of 6, unknown" in found.text
    assert "The logged responses (5)" in found.text


def test_hostile_texts_stay_texts(tmp_path: Path):
    folder = hostile_run(tmp_path / "<img src=x onerror=alert(3)>")
    (folder / "ended.json").write_text(json.dumps({"standing": "failed", "what": HOSTILE}))
    evil = replace(FINDING, name=HOSTILE, title=HOSTILE, evidence=(Evidence("objective/kl", HOSTILE),))
    text = render_report([read_run(folder)], [diagnosis_of(folder, evil)]).encode("utf-8", "replace").decode()
    found = Reader(text)
    assert [own for tag, own in found.tags if tag == "script"] == [
        {"type": "application/json", "id": "data"},
        {},
        {},
        {},
    ]
    assert {"img", "iframe", "object"}.isdisjoint(tag for tag, _ in found.tags)
    assert not [own for _, own in found.tags for name in own if name.startswith("on")]
    assert "<script>alert(1)</script><img src=x onerror=alert(2)>" in found.text
    assert "{{ 7*7 }}" in found.text
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    assert not re.search("[<>\u2028]", data[1])
    assert found.data["tokens"][0]["pieces"] == [HOSTILE[:3], (HOSTILE * 6)[3:]]


def test_the_page_loads_nothing_and_runs_no_other_script(tmp_path: Path):
    found = read_report(write_run(tmp_path / "small"))
    (policy,) = found.where("meta", http_equiv="Content-Security-Policy")
    assert re.fullmatch(
        r"default-src 'none'; script-src( 'sha256-[\w+/]{43}='){3}; style-src 'unsafe-inline'; "
        r"base-uri 'none'; form-action 'none'",
        str(policy["content"]),
    )
    assert not [own for tag, own in found.tags if tag == "link" or "src" in own]
    assert {str(own["href"])[0] for tag, own in found.tags if "href" in own} == {"#"}


def test_the_command_says_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = write_run(tmp_path / "small")
    assert main(["report", str(folder), "--json"]) == 0
    printed = capsys.readouterr()
    verdict = diagnose(read_run(folder)).verdict
    assert json.loads(printed.out) == {"report": f"{folder}/report.html", "verdicts": {str(folder): verdict}}
    assert printed.err.splitlines() == [f"{folder}: {verdict}", f"report: {folder}/report.html"]
    assert (folder / "report.html").stat().st_size > 4_000_000


def test_mistakes_are_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, empty = write_run(tmp_path / "small"), tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "taken.html").mkdir()
    mistakes = [
        ([str(tmp_path / "none")], 2, "no such folder"),
        ([str(empty)], 2, "this folder holds no run (no config.yaml) -> name a run folder"),
        ([], 2, "no settings given -> keel report RUNS"),
        ([str(folder), "--output", str(folder / "config.yaml")], 2, "not the name of an HTML file"),
        ([str(folder), "--output", str(tmp_path / "file" / "r.html")], 5, "file"),
        ([str(folder), "--output", str(tmp_path / "taken.html")], 5, "Is a directory"),
    ]
    for arguments, code, said in mistakes:
        assert main(["report", *arguments]) == code, said
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("keel: error: ")
        assert said in lines[0]
    assert yaml.safe_load((folder / "config.yaml").read_text())["steps"] == 6


def test_a_report_needs_no_torch(tmp_path: Path):
    folder = write_run(tmp_path / "small")
    code = "import sys; from keel.cli.main import main; sys.exit(main(sys.argv[1:]) or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, "report", str(folder)], check=False).returncode == 0


def test_the_answers_shown_are_those_of_the_first_run_that_kept_any(tmp_path: Path):
    """As in a folder of stages, of which only the last one answers."""
    silent, speaks = write_run(tmp_path / "silent", answers=()), write_run(tmp_path / "speaks")
    found = read_report(silent, speaks)
    assert "Responses and tokens are from speaks." in found.text
    assert "logged no responses" not in found.text
