"""The dashboard shows of each run what its files say, follows what they become, and leaves them as they are."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from keel.data.items import read_unranked_responses
from keel.diagnosis.doctor import diagnose
from keel.diagnosis.findings import Diagnosis, Finding
from keel.errors import ConfigError
from keel.run.metrics_log import truncate_after
from keel.run.read.run import State, read_run
from keel.run.rollout_log import RolloutLog
from keel.server import request_checks as shield
from keel.web.dashboard import response_list, watched_run
from keel.web.dashboard.folder import SummaryVersions

from .board import TOKEN, Board, WrittenRun, answer
from .visits import PORT


def dead_process() -> int:
    """A process that is no more."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


# ---- who may ---------------------------------------------------------------------------------------------------------


def test_the_link_leads_to_the_list_and_gives_a_cookie(tmp_path: Path) -> None:
    board = Board.of(tmp_path)
    answer = board.stranger().get("/enter", params={"token": TOKEN})
    assert answer.status_code == 200
    assert "<title>Runs" in answer.text
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith(f"keel-owner-{PORT}={TOKEN}.")
    assert all(part in cookie for part in ("HttpOnly", "SameSite=strict", "Path=/"))
    assert "Secure" not in cookie
    assert TOKEN not in answer.text


def test_behind_tls_the_cookie_travels_over_tls_alone(tmp_path: Path) -> None:
    board = Board.of(tmp_path, address="https://runs.example")
    answer = board.stranger().get("/enter", params={"token": TOKEN}, headers={"Host": "runs.example"})
    assert "Secure" in answer.headers["set-cookie"]


def test_without_the_link_there_is_nothing_to_see(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "a").go_on()
    stranger = Board.of(tmp_path).stranger()
    pair = {"of": run.name, "with": run.name, "at": 0, "there": 0}
    for path in ("/", f"/run/{run.name}", "/compare"):
        answer = stranger.get(path, params=pair)
        assert (answer.status_code, "private link" in answer.text) == (401, True)
    for path in ("/runs.json", f"/run/{run.name}/state.json", f"/run/{run.name}/answers.json", "/compare/prompts.json"):
        assert stranger.get(path, params=pair).json() == {"error": "Open the private link that keel serve printed."}
    assert stranger.get(f"/run/{run.name}/disputed.jsonl").status_code == 401
    assert stranger.get("/enter", params={"token": TOKEN[:-1]}).status_code == 404


# ---- the list --------------------------------------------------------------------------------------------------------


def test_runs_are_found_at_any_depth_and_not_inside_each_other(tmp_path: Path) -> None:
    for path in ("a", "world/ppo", "world/deep/er/sft", "a/members/0", "a/checkpoints/step-1", ".hidden/run"):
        WrittenRun(tmp_path / path).go_on()
    (tmp_path / "no run").mkdir()
    (tmp_path / "no run" / "config.yaml").write_text("steps: 1\n")
    (tmp_path / "began" / "checkpoints").mkdir(parents=True)
    (tmp_path / "began" / "config.yaml").write_text("steps: 1\n")
    assert list(Board.of(tmp_path).runs()) == ["a", "began", "world/deep/er/sft", "world/ppo"]
    assert list(Board.of(tmp_path / "a").runs()) == ["a"]


def test_a_run_that_begins_appears_and_one_that_is_gone_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keel.web.dashboard.folder.MIN_SEARCH_INTERVAL", 0.0)
    monkeypatch.setattr("keel.web.dashboard.folder.MAX_SEARCH_SHARE", 1e9)
    board = Board.of(tmp_path)
    assert board.runs() == {}
    run = WrittenRun(tmp_path / "a").go_on()
    assert list(board.runs()) == ["a"]
    (tmp_path / "a").rename(tmp_path / "b")
    assert list(board.runs()) == ["b"]
    assert board.client.get(f"/run/{run.name}/state.json").status_code == 404


def test_the_list_says_how_each_run_stands(tmp_path: Path) -> None:
    WrittenRun(tmp_path / "running").go_on(8)
    WrittenRun(tmp_path / "finished").go_on(20).end()
    WrittenRun(tmp_path / "failed").go_on(2).end("failed", "RewardError: no answer within 60 s")
    WrittenRun(tmp_path / "stopped").go_on(2).end("stopped", "Interrupted: SIGTERM")
    WrittenRun(tmp_path / "died").go_on(3).hold(dead_process())
    (WrittenRun(tmp_path / "broken").go_on().path / "config.yaml").write_text("- no\n- settings\n")
    runs = Board.of(tmp_path).runs()
    standing = {title: (run["standing"], run["step"], run["planned"]) for title, run in runs.items()}
    assert standing == {
        "broken": ("unreadable", 0, 1),
        "died": ("died", 3, 20),
        "failed": ("failed", 2, 20),
        "finished": ("finished", 20, 20),
        "running": ("running", 8, 20),
        "stopped": ("stopped", 2, 20),
    }
    assert runs["failed"]["what"] == "RewardError: no answer within 60 s"
    assert "no settings in this file" in runs["broken"]["what"]
    assert (runs["running"]["score"], runs["running"]["kl"], runs["running"]["stage"]) == (0.8, 1.6, "train")
    assert runs["running"]["headline"]["values"] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    assert abs(runs["running"]["heard"] - (tmp_path / "running" / "rollouts.jsonl").stat().st_mtime) < 0.01


def test_a_run_with_strange_files_does_not_hide_the_others(tmp_path: Path) -> None:
    """A process that no system has, and an end in words that no run uses."""
    WrittenRun(tmp_path / "own").go_on(2)
    WrittenRun(tmp_path / "process").go_on(3).hold(10**20)
    (WrittenRun(tmp_path / "end").go_on(4).path / "ended.json").write_text('{"standing": ["x"], "what": 5}')
    standing = {title: (run["standing"], run["step"]) for title, run in Board.of(tmp_path).runs().items()}
    assert standing == {"own": ("running", 2), "process": ("unknown", 3), "end": ("unknown", 4)}


FOREIGN = [
    "steps: many",
    "steps: .inf",
    "steps: [1, 2]",
    "rewards: 3",
    "rewards: [3]",
    "rewards: [{weight: heavy}]",
    "{}",
]


@pytest.mark.parametrize("text", FOREIGN)
def test_settings_of_another_program_do_not_hide_the_runs(tmp_path: Path, text: str) -> None:
    foreign, own = WrittenRun(tmp_path / "foreign").go_on(2), WrittenRun(tmp_path / "own").go_on(2)
    (foreign.path / "config.yaml").write_text(f"rollout: 1\n{text}\n" if text != "{}" else text)
    board = Board.of(tmp_path)
    runs = board.runs()
    assert (runs["own"]["standing"], len(runs)) == ("running", 2)
    assert (runs["foreign"]["standing"] == "unreadable") == (text != "{}")
    assert board.state(foreign)["title"] == "foreign"
    assert board.get("/compare/settings.json", **{"of": own.name, "with": foreign.name}) is not None


def test_the_verdict_is_that_of_the_doctor(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "flat").go_on(12)
    run.hold(dead_process())
    found = Board.of(tmp_path).runs()["flat"]
    said = diagnose(read_run(run.path))
    assert (found["verdict"], found["findings"], found["finding"]) == (
        said.verdict,
        [f"{each.name} {each.title}" for each in said.findings],
        said.findings[0].title,
    )


# ---- one run ---------------------------------------------------------------------------------------------------------


def curves(state: Any) -> dict[str, tuple[list[int], list[float | None]]]:
    found = [curve for group in state["groups"] for curve in group["curves"]]
    return {curve["figure"]: (curve["steps"], curve["values"]) for curve in found}


def test_curves_come_whole_once_and_then_only_what_is_new(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "a").go_on(3)
    board = Board.of(tmp_path)
    first = board.state(run)
    assert curves(first)["objective/scores"] == ([1, 2, 3], [0.1, 0.2, 0.3])
    assert first["points"] == []
    run.go_on(2)
    more = board.state(run, since=3, version=first["version"])
    assert more["groups"] is None
    assert {point["figure"]: (point["steps"], point["values"]) for point in more["points"]} == {
        "objective/scores": ([4, 5], [0.4, 0.5]),
        "objective/kl": ([4, 5], [0.8, 1.0]),
        "response/length": ([4, 5], [19.6, 19.5]),
    }
    none = board.state(run, since=5, version=more["version"])
    assert (none["groups"], none["points"]) == (None, [])


def test_a_figure_that_is_new_brings_the_curves_again(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "a").go_on(3)
    board = Board.of(tmp_path)
    first = board.state(run)
    run.go_on(1, **{"policy/entropy": 0.5})
    second = board.state(run, since=3, version=first["version"])
    assert curves(second)["policy/entropy"] == ([1, 2, 3, 4], [None, None, None, 0.5])


def test_a_run_that_was_cut_back_by_a_resume_is_drawn_anew(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "a").go_on(6)
    board = Board.of(tmp_path)
    first = board.state(run)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        truncate_after(run.path / name, 4)
    run.done = 4
    run.go_on(1, **{"objective/scores": 9.0})
    second = board.state(run, since=6, version=first["version"])
    assert curves(second)["objective/scores"] == ([1, 2, 3, 4, 5], [0.1, 0.2, 0.3, 0.4, 9.0])
    assert second["step"] == 5


def test_steps_that_stand_twice_count_once_as_last_written(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "a").go_on(4)
    run.done = 2
    run.go_on(1, **{"objective/scores": 7.0})
    assert curves(Board.of(tmp_path).state(run))["objective/scores"] == ([1, 2, 3, 4], [0.1, 0.2, 7.0, 0.4])


def test_of_many_new_points_the_thinned_curve_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_run, "MAX_NEW_POINTS", 3)
    run = WrittenRun(tmp_path / "a").go_on(2)
    board = Board.of(tmp_path)
    version = board.state(run)["version"]
    run.go_on(4)
    assert board.state(run, since=2, version=version)["groups"] is not None
    assert board.state(run, since=3, version=version)["groups"] is None


def test_some_steps_can_be_seen_closely(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "a", steps=5000)
    for _ in range(3):
        run.go_on(500, answers=0)
    board = Board.of(tmp_path)
    whole, _ = curves(board.state(run))["objective/scores"]
    assert len(whole) <= 601
    found = board.get(f"/run/{run.name}/curves.json", step_from=700, step_to=710)
    steps_of = {curve["figure"]: (curve["steps"], curve["values"]) for curve in found}
    assert steps_of["objective/scores"] == (list(range(700, 711)), [step / 10 for step in range(700, 711)])
    assert len(found) == 3
    assert board.get(f"/run/{run.name}/curves.json", step_from=9000) == []


def test_a_run_that_dies_is_said_to(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "a").go_on(2)
    board = Board.of(tmp_path)
    assert board.state(run)["standing"] == "running"
    run.hold(dead_process())
    assert board.state(run)["standing"] == "died"
    run.end("failed", "Diverged: the loss is not finite")
    assert (board.state(run)["standing"], board.state(run)["what"]) == ("failed", "Diverged: the loss is not finite")


def test_findings_come_with_evidence_and_what_to_change(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "a").go_on(5)
    run.hold(dead_process())
    (finding, *_) = Board.of(tmp_path).state(run)["diagnosis"]
    assert set(finding) >= {
        "name",
        "title",
        "severity",
        "first_step",
        "last_step",
        "evidence",
        "causes",
        "follows_from",
    }
    assert set(finding["causes"][0]["change"]) == {"setting", "to"}


# ---- the answers of a run --------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> WrittenRun:
    return WrittenRun(tmp_path / "runs" / "a").go_on(5)


@pytest.fixture
def board(run: WrittenRun) -> Board:
    return Board.of(run.path.parent)


def steps(page: Any) -> list[int]:
    return [row["step"] for row in page["rows"]]


def test_the_newest_answers_come_first(run: WrittenRun, board: Board) -> None:
    page = board.answers(run)
    assert (page["total"], page["matched"], page["newer"], page["read"]) == (20, 20, 0, 1.0)
    assert steps(page) == [5] * 4 + [4] * 4 + [3] * 4 + [2] * 4 + [1] * 4
    first = page["rows"][0]
    assert (first["prompt"], first["response"]) == ("question 2", " we send item 23.")
    assert (first["score"], first["kl"], first["length"], first["truncated"]) == (0.8, 0.5, 5, True)
    assert page["ranges"] == {"step": [1, 5], "score": [0.01, 1.04], "kl": [0.1, 0.5], "length": [5, 5]}


@pytest.mark.parametrize(
    ("asked", "items"),
    [
        ({"score_from": 1.0}, [19, 14, 9, 4]),
        ({"score_from": 0.5, "score_to": 0.56}, [22, 17, 12, 7]),
        ({"kl_to": 0.1}, [7, 6, 5, 4]),
        ({"step_from": 2, "step_to": 3, "truncated": "yes"}, [15, 11]),
        ({"step_from": 5, "truncated": "no"}, [22, 21, 20]),
        ({"text": "ITEM 1"}, [19, 18, 17, 16, 15, 14, 13, 12, 11, 10]),
        ({"text": "question 0", "step_from": 4}, [21, 18]),
        ({"length_from": 6}, []),
        ({"sort": "score", "step_to": 1}, [4, 7, 6, 5]),
        ({"sort": "score", "order": "up", "step_to": 1}, [5, 6, 7, 4]),
        ({"order": "up", "step_to": 1}, [4, 5, 6, 7]),
    ],
)
def test_answers_are_filtered_and_sorted(
    run: WrittenRun, board: Board, asked: dict[str, Any], items: list[int]
) -> None:
    page = board.answers(run, **asked)
    assert [int(row["response"].split()[-1][:-1]) for row in page["rows"]] == items
    assert (page["matched"], page["searched"]) == (len(items), 1.0)


def test_answers_that_come_later_do_not_move_the_pages(run: WrittenRun, board: Board) -> None:
    before = board.answers(run)
    run.go_on(2)
    after = board.answers(run, until=before["until"])
    assert (after["rows"], after["total"], after["newer"]) == (before["rows"], 20, 8)
    assert board.answers(run)["total"] == 28


def test_a_page_is_a_part_of_the_list(run: WrittenRun, board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keel.web.dashboard.views.MAX_ROWS", 6)
    whole = [row["at"] for offset in (0, 6, 12, 18) for row in board.answers(run, offset=offset)["rows"]]
    assert len(set(whole)) == 20
    assert whole == sorted(whole, reverse=True)
    assert board.answers(run, offset=20)["rows"] == []


def test_of_a_long_file_the_newest_are_there_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_list, "NEWEST_BYTES", 3000)
    monkeypatch.setattr(response_list, "MAX_SECONDS", 0.0)
    monkeypatch.setattr("keel.run.read.tail.BLOCK", 4000)
    run = WrittenRun(tmp_path / "a").go_on(20)
    board = Board.of(tmp_path)
    first = board.answers(run)
    assert (first["read"], first["rows"][0]["step"]) == (0.0, 20)
    assert 0 < first["total"] < 10
    seen, page = [], first
    while page["read"] < 1:
        page = board.answers(run, until=first["until"])
        seen.append(page["read"])
    assert seen == sorted(seen)
    assert len(seen) > 3
    assert (page["total"], page["rows"][: first["total"]]) == (80, first["rows"])


def test_a_search_goes_on_from_the_newest(run: WrittenRun, board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_list, "MAX_SECONDS", 0.0)
    monkeypatch.setattr(response_list, "SEARCH_CHUNK", 6)
    pages = [board.answers(run, text="question 1") for _ in range(4)]
    assert [page["searched"] for page in pages] == [0.3, 0.6, 0.9, 1.0]
    assert [steps(page) for page in pages] == [[5, 4], [5, 4, 4, 3], [5, 4, 4, 3, 2, 1], [5, 4, 4, 3, 2, 1, 1]]
    run.go_on(3)
    assert steps(board.answers(run, text="question 1")) == [8, 7, 7, 6, 5, 4, 4, 3, 2, 1, 1]


def test_one_answer_is_shown_with_all_that_was_kept_of_it(run: WrittenRun, board: Board) -> None:
    at = board.answers(run)["rows"][1]["at"]
    found = board.get(f"/run/{run.name}/answer.json", at=at)
    assert found == {"row": {"step": 5, **answer(5, 22)}, "prompt": "question 1", "turns": []}
    for wrong in (at + 1, 0.5, -1, 10**9):
        assert board.client.get(f"/run/{run.name}/answer.json", params={"at": wrong}).status_code in (400, 404)


def test_a_chat_is_shown_as_text(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "a").go_on(1, answers=0)
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    RolloutLog(run.path / "rollouts.jsonl").log(1, [answer(1, 1, prompt=chat)])
    board = Board.of(tmp_path)
    (row,) = board.answers(run)["rows"]
    assert row["prompt"] == "system: Be kind.\nuser: Hello"
    assert board.get(f"/run/{run.name}/answer.json", at=row["at"])["row"]["prompt"] == chat


def test_a_run_without_answers_has_none(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "a").go_on(2, answers=0)
    (run.path / "rollouts.jsonl").unlink(missing_ok=True)
    page = Board.of(tmp_path).answers(run)
    assert (page["total"], page["rows"], page["until"]) == (0, [], 0)


WRONG = [
    {"score_from": "high"},
    {"score_to": "nan"},
    {"kl_from": "inf"},
    {"offset": 1.5},
    {"offset": -2},
    {"offset": 1e300},
    {"until": "x"},
    {"sort": "prompt"},
    {"order": "sideways"},
    {"truncated": "maybe"},
    {"text": "x" * 501},
]


@pytest.mark.parametrize("asked", WRONG)
def test_what_cannot_be_asked_for_is_refused(run: WrittenRun, board: Board, asked: dict[str, Any]) -> None:
    refused = board.client.get(f"/run/{run.name}/answers.json", params=asked)
    assert (refused.status_code, list(refused.json())) == (400, ["error"])


def test_a_run_nobody_knows_is_not_there(board: Board) -> None:
    for path in ("/run/none", "/run/none/state.json", "/run/none/answers.json", "/run/none/answer.json"):
        assert board.client.get(path).status_code == 404
    assert board.client.get("/compare", params={"of": "none", "with": "none"}).status_code == 404


# ---- disputed answers ------------------------------------------------------------------------------------------------


def test_answers_that_scorers_dispute_are_a_file_for_keel_rank(run: WrittenRun, board: Board, tmp_path: Path) -> None:
    found = board.client.get(f"/run/{run.name}/disputed.jsonl")
    assert found.headers["content-disposition"] == 'attachment; filename="disputed.jsonl"'
    (tmp_path / "disputed.jsonl").write_bytes(found.content)
    rows = read_unranked_responses(str(tmp_path / "disputed.jsonl"))
    # judge says the opposite of model: the best and the worst of each prompt by score
    assert {(row.prompt, frozenset(row.responses)) for row in rows} == {
        ("question 0", frozenset({" we send item 9.", " we send item 15."})),
        ("question 1", frozenset({" we send item 19.", " we send item 10."})),
        ("question 2", frozenset({" we send item 14.", " we send item 5."})),
    }
    assert {row.source for row in rows} == {"a"}


def test_the_filters_hold_for_disputes_too(run: WrittenRun, board: Board) -> None:
    text = board.client.get(f"/run/{run.name}/disputed.jsonl", params={"step_to": 2, "most": 1}).text
    (row,) = map(json.loads, text.splitlines())
    assert all(int(response.split()[-1][:-1]) < 12 for response in row["responses"])
    none = board.client.get(f"/run/{run.name}/disputed.jsonl", params={"step_from": 99})
    assert (none.status_code, "No prompt has two different responses" in none.text) == (404, True)


def test_scorers_that_agree_dispute_nothing(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "a").go_on(1, answers=0)
    rows = [answer(1, i, scores={"model": float(i), "judge": 2.0 * i}) for i in range(8)]
    RolloutLog(run.path / "rollouts.jsonl").log(1, rows)
    board = Board.of(tmp_path)
    assert board.client.get(f"/run/{run.name}/disputed.jsonl").status_code == 404
    assert steps(board.answers(run, sort="disagreement")) == [1] * 8


def test_the_answer_that_scorers_dispute_most_can_be_put_first(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "a").go_on(1, answers=0)
    scores = [(0.0, 0.1), (1.0, 0.9), (2.0, 0.2), (3.0, 0.8), (4.0, None)]
    rows = [answer(1, i, scores={"model": one, "judge": other}) for i, (one, other) in enumerate(scores)]
    RolloutLog(run.path / "rollouts.jsonl").log(1, rows)
    page = Board.of(tmp_path).answers(run, sort="disagreement")
    # places by model 0, 1/4, 2/4, 3/4, 1; by judge 0, 1, 1/3, 2/3, none
    assert [row["response"][-2] for row in page["rows"]] == ["1", "2", "3", "0", "4"]


# ---- two runs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> tuple[WrittenRun, WrittenRun]:
    here = WrittenRun(tmp_path / "runs" / "here", algorithm={"kl_coef": 0.05})
    there = WrittenRun(tmp_path / "runs" / "there", algorithm={"kl_coef": 0.1})
    for run, shift in ((here, 0.0), (there, 0.5)):
        run.go_on(2, answers=0)
        rows = [
            answer(2, 1, prompt="both", response="a b c", score=1.0 + shift),
            answer(2, 2, prompt="both", response=f"a b {run.path.name}", score=2.0 + shift),
            answer(2, 3, prompt=f"only {run.path.name}"),
            answer(2, 4, prompt="same", response="as ever", score=1.0),
            answer(2, 5, prompt="lost", response=f"from {run.path.name}", score=1.0 - 3 * shift),
        ]
        RolloutLog(run.path / "rollouts.jsonl").log(2, rows)
    return here, there


def test_two_runs_are_compared_by_what_they_share(two: tuple[WrittenRun, WrittenRun]) -> None:
    here, there = two
    board, both = Board.of(here.path.parent), {"of": here.name, "with": there.name}
    assert "here and there" in board.client.get("/compare", params=both).text
    assert board.get("/compare/settings.json", **both) == [{"name": "algorithm.kl_coef", "values": [0.05, 0.1]}]
    page = board.get("/compare/prompts.json", **both)
    assert [(row["prompt"], row["means"], row["counts"]) for row in page["rows"]] == [
        ("lost", [1.0, -0.5], [1, 1]),
        ("same", [1.0, 1.0], [1, 1]),
        ("both", [1.5, 2.0], [2, 2]),
    ]
    orders = {
        by: [row["prompt"] for row in board.get("/compare/prompts.json", by=by, **both)["rows"]]
        for by in ("better", "worse")
    }
    assert orders == {"better": ["both", "same", "lost"], "worse": ["lost", "same", "both"]}
    assert board.get("/compare/prompts.json", text="FROM THERE", **both)["matched"] == 1


def test_answers_to_one_prompt_stand_side_by_side(two: tuple[WrittenRun, WrittenRun]) -> None:
    here, there = two
    board, both = Board.of(here.path.parent), {"of": here.name, "with": there.name}
    row = board.get("/compare/prompts.json", **both)["rows"][2]
    pair = board.get("/compare/answers.json", at=row["at"], there=row["there"], **both)
    assert [each["response"] for each in pair["rows"]] == ["a b here", "a b there"]
    marks = [(kind, text.strip()) for kind, text in pair["differences"]]
    assert marks == [("same", "a b"), ("removed", "here"), ("added", "there")]
    assert [[(each["step"], each["score"]) for each in side] for side in pair["choices"]] == [
        [(2, 2.0), (2, 1.0)],
        [(2, 2.5), (2, 1.5)],
    ]
    assert pair["prompts"] == ["both", "both"]


def test_answers_of_two_runs_that_score_alike_are_a_file_for_keel_rank(two: tuple[WrittenRun, WrittenRun]) -> None:
    here, there = two
    board = Board.of(here.path.parent)
    text = board.client.get("/compare/disputed.jsonl", params={"of": here.name, "with": there.name}).text
    rows = [json.loads(line) for line in text.splitlines()]
    assert [(row["prompt"], row["responses"]) for row in rows] == [
        ("both", ["a b here", "a b there"]),  # 0.5 apart
        ("lost", ["from here", "from there"]),  # 1.5 apart; and of "same" the answers are one
    ]


def test_a_run_may_be_compared_with_itself(two: tuple[WrittenRun, WrittenRun]) -> None:
    here, _ = two
    board, both = Board.of(here.path.parent), {"of": here.name, "with": here.name}
    assert board.get("/compare/settings.json", **both) == []
    assert board.get("/compare/prompts.json", **both)["total"] == 4


# ---- keel serve ------------------------------------------------------------------------------------------------------


def test_one_visit_waits_for_its_turn_and_is_sent_away_when_there_are_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shield, "MAX_WAITING", 0)
    board = Board.of(tmp_path)
    refused = board.client.get("/runs.json")
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert board.client.get("/").status_code == 200


def test_the_verb_needs_a_folder(tmp_path: Path) -> None:
    from keel.cli.serve import run

    with pytest.raises(ConfigError, match="no such folder"):
        run([str(tmp_path / "none")])
    with pytest.raises(ConfigError, match="can be reached from other machines"):
        run([str(tmp_path), "--host", "0.0.0.0"])


# ---- what does not change costs nothing ------------------------------------------------------------------------------


def test_a_version_may_hold_a_hyphen() -> None:
    listed = SummaryVersions()
    listed.start = "Fc-mVvC2"
    first = listed.changes_since("", [{"name": "a"}])
    assert listed.changes_since(first["version"], [{"name": "a"}]) == {
        "version": first["version"],
        "names": None,
        "runs": [],
    }


def test_only_what_has_changed_is_sent_again(tmp_path: Path) -> None:
    written = [WrittenRun(tmp_path / f"run-{i}").go_on(3) for i in range(5)]
    for run in written[1:]:
        run.end()
    board = Board.of(tmp_path)
    board.runs()
    first = board.get("/runs.json")
    assert [run["title"] for run in first["runs"]] == [f"run-{i}" for i in range(5)]
    assert first["names"] == [run["name"] for run in first["runs"]]
    again = board.get("/runs.json", version=first["version"])
    assert (again["version"], again["names"], again["runs"]) == (first["version"], None, [])
    written[0].go_on()
    board.runs()
    later = board.get("/runs.json", version=first["version"])
    assert [(run["title"], run["step"]) for run in later["runs"]] == [("run-0", 4)]
    assert board.get("/runs.json", version="another-0")["runs"] == board.get("/runs.json")["runs"]


def test_a_run_that_came_brings_the_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keel.web.dashboard.folder.MIN_SEARCH_INTERVAL", 0.0)
    monkeypatch.setattr("keel.web.dashboard.folder.MAX_SEARCH_SHARE", 1e9)
    WrittenRun(tmp_path / "b").go_on().end()
    board = Board.of(tmp_path)
    board.runs()
    version = board.get("/runs.json")["version"]
    WrittenRun(tmp_path / "a").go_on().end()
    board.runs()
    found = board.get("/runs.json", version=version)
    assert "a" in [run["title"] for run in found["runs"]]
    assert len(found["names"]) == 2


def test_what_the_reader_has_already_is_not_sent(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run").go_on(3).end()
    board = Board.of(tmp_path)
    board.runs()
    for path in ("/runs.json", f"/run/{run.name}/curves.json"):
        first = board.client.get(path)
        again = board.client.get(path, headers={"If-None-Match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert board.client.get(path, headers={"If-None-Match": '"another"'}).content == first.content


def test_files_that_have_not_changed_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = WrittenRun(tmp_path / "run").go_on(3).end()
    board = Board.of(tmp_path)
    board.runs()
    with monkeypatch.context() as patched:
        patched.setattr("keel.run.read.tail.open_regular", lambda _: pytest.fail("it is read"))
        patched.setattr("keel.run.folder.load_settings", lambda _: pytest.fail("they are read"))
        assert board.runs()["run"]["step"] == 3
    run.go_on()
    assert board.runs()["run"]["step"] == 4


@pytest.mark.parametrize("name", ["policy", "critic", "model", "members", "checkpoints", "faults", "tensorboard"])
def test_a_run_may_have_any_name(tmp_path: Path, name: str) -> None:
    WrittenRun(tmp_path / name).go_on().end()
    inside = WrittenRun(tmp_path / "outer" / name).go_on().end()
    (inside.path.parent / "config.yaml").write_text("seed: 0")
    (inside.path.parent / "metrics.jsonl").write_text("")
    assert sorted(Board.of(tmp_path).runs()) == sorted([name, "outer"])


def test_the_gravest_open_finding_is_listed() -> None:
    def finding(name: str, severity: Any, last_step: int | None) -> Finding:
        return Finding(name, f"title of {name}", severity, "policy", 1, last_step, (), ())

    over, mild = finding("over", "critical", 3), finding("mild", "notice", None)
    grave = finding("grave", "warning", None)
    for found, expected in (
        ((over, mild, grave), grave),
        ((over, mild), mild),
        ((over,), over),
        ((), None),
    ):
        diagnosis = Diagnosis("run", "run", "train", State("running"), 5, 9, found)
        assert diagnosis.gravest == expected


# ---- files that others made ------------------------------------------------------------------------------------------

NAMES = zip("abcdefgh", "bcdefghi", strict=True)
BOMB = "a: &a [x, x, x]\n" + "".join(f"{new}: &{new} [*{old}, *{old}, *{old}]\n" for old, new in NAMES)


@pytest.mark.parametrize(
    "text",
    [BOMB, "a: &a {b: *a}", "a: " + "[" * 30_000, "a: " + "{b: " * 5000, "a: " + "x" * 3_000_000],
    ids=["aliases", "a circle", "lists", "mappings", "megabytes"],
)
def test_settings_that_unfold_are_refused_once(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = WrittenRun(tmp_path / "odd").go_on()
    WrittenRun(tmp_path / "run").go_on().end()
    (run.path / "config.yaml").write_text(text)
    board = Board.of(tmp_path)
    began = time.monotonic()
    found = board.runs()
    assert {title: run["standing"] for title, run in found.items()} == {"odd": "unreadable", "run": "finished"}
    assert time.monotonic() - began < 10
    monkeypatch.setattr("keel.run.folder.load_settings", lambda _: pytest.fail("they are read again"))
    assert board.runs()["odd"]["standing"] == "unreadable"


def test_figures_without_end_are_cut_and_named(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run").go_on(3)
    with (run.path / "metrics.jsonl").open("a") as file:
        for step in range(4, 16):
            file.write(json.dumps({"step": step, **{f"new/{step}-{i}": 1.0 for i in range(1000)}}) + "\n")
        file.write(json.dumps({"step": 16, "objective/scores": 7.0}) + "\n")
    board = Board.of(tmp_path)
    found = board.runs()["run"]
    assert (found["step"], found["score"]) == (16, 7.0)
    assert any("2000 metrics" in words for words in found["incomplete"])


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "rollouts.jsonl", "ended.json", ".lock"])
def test_a_pipe_in_place_of_a_file_holds_nobody_up(tmp_path: Path, name: str) -> None:
    run = WrittenRun(tmp_path / "odd").go_on()
    other = WrittenRun(tmp_path / "run").go_on().end()
    (run.path / name).unlink(missing_ok=True)
    os.mkfifo(run.path / name)
    board = Board.of(tmp_path)
    assert board.runs()["run"]["standing"] == "finished"
    for path in (f"/run/{run.name}/answers.json", f"/run/{other.name}/answers.json"):
        assert board.client.get(path).status_code in (200, 503)
