"""What the pages of `keel serve` fetch: from the runs and what is asked for to plain values. Each runs in a thread."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from keel.run.read.compare import settings_differences
from keel.run.read.responses import as_text
from keel.server.limits import Refused
from keel.web.dashboard.ask import Asked
from keel.web.dashboard.compare import alike, pair, shared_page
from keel.web.dashboard.disputes import as_rows, between_scorers
from keel.web.dashboard.folder import RunsBelow
from keel.web.dashboard.responses import RunAnswers
from keel.web.dashboard.run import WatchedRun
from keel.web.pages import as_messages

ROWS = 200  # most rows of a list that travel at once
PROMPTS = 1000  # most prompts of a file of disputed answers
View = Callable[[RunsBelow, Asked], Any]


def list_of_runs(runs: RunsBelow, asked: Asked) -> Any:
    """All runs or, for who names the version that they have, what has changed since."""
    return {"folder": str(runs.root), **runs.listed.since(asked.text("version"), runs.summaries())}


def run_state(runs: RunsBelow, asked: Asked) -> Any:
    run = runs.run(asked.text("run"))
    since, version = asked.count("since", -1), asked.text("version")
    run.look(runs.doctor)
    return run.details(since, version)


def some_steps(runs: RunsBelow, asked: Asked) -> Any:
    return runs.run(asked.text("run")).closely(asked.range("step"))


def answer_list(runs: RunsBelow, asked: Asked) -> Any:
    query, offset = asked.query(), asked.count("offset", 0)
    with answers_of(runs.run(asked.text("run"))) as (answers,):
        return answers.page(query, max(offset, 0), ROWS)


def one_answer(runs: RunsBelow, asked: Asked) -> Any:
    with answers_of(runs.run(asked.text("run"))) as (answers,):
        row = answers.shown.rows([answers.at(asked.count("at", 0))])[0]
    return {"row": row, "prompt": as_text(row.get("prompt", "")), "turns": turns_of(row.get("prompt"))}


def turns_of(prompt: Any) -> list[dict[str, str]]:
    """The turns of a prompt that is a conversation; none where it is not."""
    is_chat = isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt)
    return as_messages(prompt) if is_chat else []


def disputed(runs: RunsBelow, asked: Asked) -> bytes:
    """A file for `keel rank` of answers on which the run's scorers disagree."""
    run, query, most = runs.run(asked.text("run")), asked.query(), asked.count("most", 50, PROMPTS)
    with answers_of(run) as (answers,):
        numbers, _ = answers.matching(query)
        found = between_scorers(answers.shown, numbers)
        rows = as_rows([[(answers.shown, int(number)) for number in each.numbers] for each in found], most, run.title)
    return as_lines(rows)


def settings(runs: RunsBelow, asked: Asked) -> Any:
    both = both_runs(runs, asked)
    for run in both:
        run.look(runs.doctor)
    return settings_differences([run.run for run in both])


def prompts_of_both(runs: RunsBelow, asked: Asked) -> Any:
    offset, by = asked.count("offset", 0), asked.one_of("by", "newest", "better", "worse")
    with answers_of(*both_runs(runs, asked)) as (here, there):
        page = shared_page(here.shown, there.shown, asked.text("text").strip(), by, max(offset, 0), ROWS)
    return page | {"read": min(here.read, there.read)}


def answers_of_both(runs: RunsBelow, asked: Asked) -> Any:
    with answers_of(*both_runs(runs, asked)) as (here, there):
        one, other = here.at(asked.count("at", 0)), there.at(asked.count("there", 0))
        return pair(here.shown, there.shown, one, other)


def disputed_of_both(runs: RunsBelow, asked: Asked) -> bytes:
    """A file for `keel rank` of answers of two runs to the same prompts that score alike."""
    both, most = both_runs(runs, asked), asked.count("most", 50, PROMPTS)
    with answers_of(*both) as (here, there):
        found = alike(here.shown, there.shown)
        pairs = [[(here.shown, int(each.numbers[0])), (there.shown, int(each.numbers[1]))] for each in found]
        rows = as_rows(pairs, most, " and ".join(run.title for run in both))
    return as_lines(rows)


VIEWS: Mapping[str, View] = {
    "/runs.json": list_of_runs,
    "/run/{run}/state.json": run_state,
    "/run/{run}/curves.json": some_steps,
    "/run/{run}/answers.json": answer_list,
    "/run/{run}/answer.json": one_answer,
    "/run/{run}/disputed.jsonl": disputed,
    "/compare/settings.json": settings,
    "/compare/prompts.json": prompts_of_both,
    "/compare/answers.json": answers_of_both,
    "/compare/disputed.jsonl": disputed_of_both,
}


def both_runs(runs: RunsBelow, asked: Asked) -> list[WatchedRun]:
    return [runs.run(asked.text(name)) for name in ("of", "with")]


@contextmanager
def answers_of(*runs: WatchedRun) -> Iterator[list[RunAnswers]]:
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
