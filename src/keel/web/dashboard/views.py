"""What the pages of `keel serve` fetch: from the runs and what is asked for to plain values. Each runs in a thread."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from keel.run.read.compare import settings_differences
from keel.run.read.responses import as_text
from keel.server.limits import Refused
from keel.web.dashboard.disputes import as_rows, between_scorers
from keel.web.dashboard.folder import RunsBelow
from keel.web.dashboard.query_parameters import QueryParameters
from keel.web.dashboard.response_list import RunResponses
from keel.web.dashboard.run_comparison import alike, pair, shared_page
from keel.web.dashboard.watched_run import WatchedRun
from keel.web.pages import page_turns

ROWS = 200  # most rows of a list that travel at once
PROMPTS = 1000  # most prompts of a file of disputed answers
View = Callable[[RunsBelow, QueryParameters], Any]


def list_of_runs(runs: RunsBelow, asked: QueryParameters) -> Any:
    """All runs or, for who names the version that they have, what has changed since."""
    return {"folder": str(runs.root), **runs.listed.since(asked.text("version"), runs.summaries())}


def run_state(runs: RunsBelow, asked: QueryParameters) -> Any:
    run = runs.run(asked.text("run"))
    since, version = asked.count("since", -1), asked.text("version")
    run.look(runs.doctor)
    return run.details(since, version)


def some_steps(runs: RunsBelow, asked: QueryParameters) -> Any:
    return runs.run(asked.text("run")).closely(asked.range("step"))


def list_responses(runs: RunsBelow, asked: QueryParameters) -> Any:
    query, offset = asked.query(), asked.count("offset", 0)
    with responses_locked(runs.run(asked.text("run"))) as (responses,):
        return responses.page(query, max(offset, 0), ROWS)


def show_response(runs: RunsBelow, asked: QueryParameters) -> Any:
    with responses_locked(runs.run(asked.text("run"))) as (responses,):
        row = responses.shown.rows([responses.find_line(asked.count("at", 0))])[0]
    return {"row": row, "prompt": as_text(row.get("prompt", "")), "turns": conversation_turns(row.get("prompt"))}


def conversation_turns(prompt: Any) -> list[dict[str, str]]:
    """The turns of a prompt that is a conversation; none where it is not."""
    is_chat = isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt)
    return page_turns(prompt) if is_chat else []


def export_disputes(runs: RunsBelow, asked: QueryParameters) -> bytes:
    """A file for `keel rank` of answers on which the run's scorers disagree."""
    run, query, most = runs.run(asked.text("run")), asked.query(), asked.count("most", 50, PROMPTS)
    with responses_locked(run) as (responses,):
        numbers, _ = responses.matching(query)
        found = between_scorers(responses.shown, numbers)
        rows = as_rows([[(responses.shown, int(number)) for number in each.numbers] for each in found], most, run.title)
    return as_lines(rows)


def settings(runs: RunsBelow, asked: QueryParameters) -> Any:
    both = both_runs(runs, asked)
    for run in both:
        run.look(runs.doctor)
    return settings_differences([run.run for run in both])


def prompts_of_both(runs: RunsBelow, asked: QueryParameters) -> Any:
    offset, by = asked.count("offset", 0), asked.choice("by", "newest", "better", "worse")
    with responses_locked(*both_runs(runs, asked)) as (here, there):
        page = shared_page(here.shown, there.shown, asked.text("text").strip(), by, max(offset, 0), ROWS)
    return page | {"read": min(here.read, there.read)}


def compare_pair(runs: RunsBelow, asked: QueryParameters) -> Any:
    with responses_locked(*both_runs(runs, asked)) as (here, there):
        one, other = here.find_line(asked.count("at", 0)), there.find_line(asked.count("there", 0))
        return pair(here.shown, there.shown, one, other)


def disputed_of_both(runs: RunsBelow, asked: QueryParameters) -> bytes:
    """A file for `keel rank` of answers of two runs to the same prompts that score alike."""
    both, most = both_runs(runs, asked), asked.count("most", 50, PROMPTS)
    with responses_locked(*both) as (here, there):
        found = alike(here.shown, there.shown)
        pairs = [[(here.shown, int(each.numbers[0])), (there.shown, int(each.numbers[1]))] for each in found]
        rows = as_rows(pairs, most, " and ".join(run.title for run in both))
    return as_lines(rows)


VIEWS: Mapping[str, View] = {
    "/runs.json": list_of_runs,
    "/run/{run}/state.json": run_state,
    "/run/{run}/curves.json": some_steps,
    "/run/{run}/answers.json": list_responses,
    "/run/{run}/answer.json": show_response,
    "/run/{run}/disputed.jsonl": export_disputes,
    "/compare/settings.json": settings,
    "/compare/prompts.json": prompts_of_both,
    "/compare/answers.json": compare_pair,
    "/compare/disputed.jsonl": disputed_of_both,
}


def both_runs(runs: RunsBelow, asked: QueryParameters) -> list[WatchedRun]:
    return [runs.run(asked.text(name)) for name in ("of", "with")]


@contextmanager
def responses_locked(*runs: WatchedRun) -> Iterator[list[RunResponses]]:
    """Their answers as they are now, held so that no other thread changes them."""
    with ExitStack() as held:
        for run in sorted(
            set(runs), key=lambda run: run.name
        ):  # always in this order, or two could wait for each other
            held.enter_context(run.answers.lock)
            run.check_links()
            run.answers.refresh()
        yield [run.answers for run in runs]


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    if not rows:
        raise Refused(404, "No prompt has two different answers to settle here.")
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
