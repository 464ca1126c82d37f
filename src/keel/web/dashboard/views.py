"""The views behind the JSON requests of `keel serve`: functions of the runs and the query. Each runs in a thread."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from keel.run.read.compare import settings_differences
from keel.run.read.responses import as_text
from keel.server.limits import Refused
from keel.web.dashboard.disputes import disputes_between_scorers, unranked_rows
from keel.web.dashboard.folder import RunsBelow
from keel.web.dashboard.query_parameters import QueryParameters
from keel.web.dashboard.response_list import RunResponses
from keel.web.dashboard.run_comparison import disputes_between_runs, response_pair, shared_page
from keel.web.dashboard.watched_run import WatchedRun
from keel.web.pages import page_turns

MAX_ROWS = 200  # rows of a list in one response
MAX_PROMPTS = 1000  # prompts in a file of disputed responses
View = Callable[[RunsBelow, QueryParameters], Any]


def list_runs(runs: RunsBelow, parameters: QueryParameters) -> Any:
    """Return the summaries of all runs, or those that changed since the version that the client names."""
    changes = runs.versions.changes_since(parameters.text("version"), runs.summaries())
    return {"folder": str(runs.root), **changes}


def run_state(runs: RunsBelow, parameters: QueryParameters) -> Any:
    run = runs.run(parameters.text("run"))
    since, version = parameters.count("since", -1), parameters.text("version")
    run.refresh(runs.doctor)
    return run.details(since, version)


def curve_section(runs: RunsBelow, parameters: QueryParameters) -> Any:
    return runs.run(parameters.text("run")).curves_between(parameters.range("step"))


def list_responses(runs: RunsBelow, parameters: QueryParameters) -> Any:
    query, offset = parameters.response_query(), parameters.count("offset", 0)
    with responses_locked(runs.run(parameters.text("run"))) as (responses,):
        return responses.page(query, max(offset, 0), MAX_ROWS)


def show_response(runs: RunsBelow, parameters: QueryParameters) -> Any:
    with responses_locked(runs.run(parameters.text("run"))) as (responses,):
        row = responses.shown.rows([responses.find_line(parameters.count("at", 0))])[0]
    return {"row": row, "prompt": as_text(row.get("prompt", "")), "turns": conversation_turns(row.get("prompt"))}


def conversation_turns(prompt: Any) -> list[dict[str, str]]:
    """Return the turns of a conversation; none for any other prompt."""
    is_chat = isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt)
    return page_turns(prompt) if is_chat else []


def export_disputes(runs: RunsBelow, parameters: QueryParameters) -> bytes:
    """Return a file for `keel rank` of responses on which the run's scorers disagree."""
    run, query = runs.run(parameters.text("run")), parameters.response_query()
    limit = parameters.count("most", 50, MAX_PROMPTS)
    with responses_locked(run) as (responses,):
        numbers, _ = responses.matching(query)
        disputes = disputes_between_scorers(responses.shown, numbers)
        sources = [[(responses.shown, int(number)) for number in dispute.numbers] for dispute in disputes]
        rows = unranked_rows(sources, limit, run.title)
    return rows_to_jsonl(rows)


def compare_settings(runs: RunsBelow, parameters: QueryParameters) -> Any:
    both = both_runs(runs, parameters)
    for run in both:
        run.refresh(runs.doctor)
    return settings_differences([run.snapshot.run for run in both])


def compare_prompts(runs: RunsBelow, parameters: QueryParameters) -> Any:
    offset, by = parameters.count("offset", 0), parameters.choice("by", "newest", "better", "worse")
    text = parameters.text("text").strip()
    with responses_locked(*both_runs(runs, parameters)) as (here, there):
        page = shared_page(here.shown, there.shown, text, by, max(offset, 0), MAX_ROWS)
    return page | {"read": min(here.read_share, there.read_share)}


def compare_responses_in_full(runs: RunsBelow, parameters: QueryParameters) -> Any:
    with responses_locked(*both_runs(runs, parameters)) as (here, there):
        one, other = here.find_line(parameters.count("at", 0)), there.find_line(parameters.count("there", 0))
        return response_pair(here.shown, there.shown, one, other)


def export_disputes_of_both(runs: RunsBelow, parameters: QueryParameters) -> bytes:
    """Return a file for `keel rank` of responses of two runs to the same prompts with nearly equal scores."""
    both, limit = both_runs(runs, parameters), parameters.count("most", 50, MAX_PROMPTS)
    with responses_locked(*both) as (here, there):
        disputes = disputes_between_runs(here.shown, there.shown)
        sources = [
            [(here.shown, int(dispute.numbers[0])), (there.shown, int(dispute.numbers[1]))] for dispute in disputes
        ]
        rows = unranked_rows(sources, limit, " and ".join(run.title for run in both))
    return rows_to_jsonl(rows)


VIEWS: Mapping[str, View] = {
    "/runs.json": list_runs,
    "/run/{run}/state.json": run_state,
    "/run/{run}/curves.json": curve_section,
    "/run/{run}/answers.json": list_responses,
    "/run/{run}/answer.json": show_response,
    "/run/{run}/disputed.jsonl": export_disputes,
    "/compare/settings.json": compare_settings,
    "/compare/prompts.json": compare_prompts,
    "/compare/answers.json": compare_responses_in_full,
    "/compare/disputed.jsonl": export_disputes_of_both,
}


def both_runs(runs: RunsBelow, parameters: QueryParameters) -> list[WatchedRun]:
    return [runs.run(parameters.text(name)) for name in ("of", "with")]


@contextmanager
def responses_locked(*runs: WatchedRun) -> Iterator[list[RunResponses]]:
    """Yield the current responses of each run, locked against changes by other threads."""
    with ExitStack() as locks:
        # Always in the same order: otherwise two requests for the same two runs could wait for each other forever.
        for run in sorted(set(runs), key=lambda run: run.name):
            locks.enter_context(run.responses.lock)
            run.check_links()
            run.responses.refresh()
        yield [run.responses for run in runs]


def rows_to_jsonl(rows: list[dict[str, Any]]) -> bytes:
    if not rows:
        raise Refused(404, "No prompt has two different responses whose order is open.")
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
