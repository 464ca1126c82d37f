"""Check what a data file contains and what is wrong with it, and convert it.

keel reads comparisons (keel's rankings, TRL pairs, Anthropic HH, UltraFeedback binarised, NeMo, OpenAI), responses to
rank, responses with labels (KTO), demonstrations and prompts. It reads the file to its end, counts every broken row and
names the first ones.

The exit code is 0 if every row is usable and shares no prompt with a file given by --against; else it is 2.
Duplicates, contradictions, ties and empty responses are reported, but leave it at 0. --convert writes the usable rows;
the exit code still shows whether all rows were usable.

With --model, keel also reads every row with the tokenizer and chat template of that model, and names the rows that
fail. --show prints rows as tokens, with the learned or scored tokens marked. If the template refuses a row, the exit
code is 2.

example:
  keel data check pairs.jsonl --against heldout.jsonl --convert rankings.jsonl
  keel data check chats.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct --show 3
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from keel.cli.help import Verb
from keel.cli.settings import HELP, read_command
from keel.config import DataCheckConfig
from keel.errors import ConfigError, DataError
from keel.terminal import literal

VERB = Verb("data check", DataCheckConfig, str(__doc__), positional="path")
NAMED_ERRORS = 5
"""number of broken rows, and of line numbers for each finding, that are printed; --json has more"""
LABEL_WIDTH = 19


def run(arguments: list[str]) -> dict[str, Any]:
    """Print and return what the file holds.

    Raises DataError, with the metrics attached, for a file that should not be used as it is.
    """
    if arguments[:1] == ["check"]:
        arguments = arguments[1:]
    elif not HELP & set(arguments[:1]):  # `keel data --help` works without `check`
        raise ConfigError("`keel data` has one subcommand: check", fix="keel data check FILE, or see keel data --help")
    settings = read_command(VERB, arguments).settings
    from keel.cli.data_tokens import model_metrics
    from keel.data.check import check_report, check_verdict
    from keel.data.contents import read_contents

    contents = read_contents(settings.path, settings.split, settings.column)
    others = [read_contents(path, settings.split, settings.column) for path in settings.against]
    metrics = check_report(contents, others)
    if settings.model is not None:
        metrics["model"] = model_metrics(settings, contents.purpose)
    _print(metrics)
    if settings.convert is not None:
        metrics["converted"] = _convert(contents.rankings, settings.convert, settings.path)
    problem = check_verdict(metrics)
    if problem:
        lacks_column = (
            contents.purpose == "prompts"
            and not contents.entries
            and "no column" in metrics["broken"]["why"][0]["what"]
        )
        fix = "name the column that holds the prompts: --column NAME" if lacks_column else ""
        error = DataError(problem, where=settings.path, fix=fix)
        error.metrics = metrics
        raise error
    return metrics


def _convert(rankings: Sequence[Any], path: str, source: str) -> int:
    """Write rankings in keel's format, and return their number."""
    from keel.ranking.export import json_lines, ranking_row
    from keel.run.folder import write_atomic

    if not rankings:
        raise DataError("no row compares responses, so there is nothing to convert", where=source)
    if Path(path).resolve() == Path(source).resolve():
        raise ConfigError("this is the file that was read", where="convert", fix="choose another file name")
    if Path(path).suffix != ".jsonl":
        raise ConfigError(
            f"{path} does not end in .jsonl", where="convert", fix="name it FILE.jsonl; keel reads a file by its ending"
        )
    write_atomic(Path(path), json_lines(ranking_row(ranking) for ranking in rankings))
    print(f"{path}: {len(rankings):,} rankings written")
    return len(rankings)


def _print(metrics: Mapping[str, Any]) -> None:
    from keel.cli.data_tokens import shown_lines

    print(literal(metrics["file"]))
    for name, text in _lines(metrics):
        print(f"  {name:<{LABEL_WIDTH}}{literal(text)}")
    for broken in metrics["broken"]["why"][:NAMED_ERRORS]:
        print(f"  {'line ' + str(broken['line']):<{LABEL_WIDTH}}{literal(broken['what'])}")
    for remark in metrics["remarks"] + metrics.get("model", {}).get("remarks", []):
        print(f"  {'note':<{LABEL_WIDTH}}{literal(remark)}")
    for refused in metrics.get("model", {}).get("refused", {"why": []})["why"][:NAMED_ERRORS]:
        print(f"  {'line ' + str(refused['line']):<{LABEL_WIDTH}}{literal(refused['what'])}")
    for row in metrics.get("model", {}).get("shown", []):
        print("\n".join(map(literal, shown_lines(row))))
    if len(metrics["broken"]["why"]) > NAMED_ERRORS:
        print(f"  {'':<{LABEL_WIDTH}}and {len(metrics['broken']['why']) - NAMED_ERRORS:,} more; --json lists them")


def _lines(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    from keel.data.check import num_rows

    prompts, responses = metrics["prompts"], metrics["answers"]
    forms = _counts(metrics["forms"]) if len(metrics["forms"]) > 1 else "".join(metrics["forms"])
    yield "holds", f"{metrics['purpose']} ({forms})" if forms not in ("", metrics["purpose"]) else metrics["purpose"]
    broken = metrics["broken"]["rows"]
    yield "rows", f"{metrics['rows']:,}" + (f", {broken:,} of them broken" if broken else ", all can be used")
    if prompts["characters"]:
        yield "prompts", f"{prompts['distinct']:,} distinct; {_counts(prompts['kinds'])}"
        yield "  characters", _lengths(prompts["characters"])
    if responses["characters"]:
        if metrics["purpose"] != "texts":
            yield "responses per row", _sizes(responses["per_row"])
        yield "  characters" if metrics["purpose"] != "texts" else "characters", _lengths(responses["characters"])
    problems = {"empty responses": responses["empty"], "duplicate rows": metrics["duplicates"]}
    if metrics["preferences"]:
        yield from _preferences(metrics["preferences"])
        problems["equal responses"] = metrics["preferences"]["same_answer_both_ways"]
    if metrics["labels"]:
        yield (
            "labels",
            f"{metrics['labels']['desirable']:,} desirable, {metrics['labels']['undesirable']:,} undesirable",
        )
        problems["labelled both ways"] = metrics["labels"]["contradictions"]
    yield from ((name, _format_rows(rows)) for name, rows in problems.items() if rows["rows"])
    for name in ("raters", "sources"):
        if metrics[name]:
            yield name, _counts(metrics[name])
    for leak in metrics["leaks"]:
        unread = f"; {num_rows(leak['unread'])} there cannot be read" if leak["unread"] else ""
        yield "shared prompts", f"{leak['prompts']:,} with {leak['file']}, {_format_rows(leak)}{unread}"
    if metrics.get("model"):
        yield from _tokens(metrics["model"])


def _preferences(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "pairs", f"{metrics['told_apart']:,} with a preference; {metrics['tied_share']:.1%} of all ranked pairs tie"
    yield "not ranked", f"{metrics['not_ranked_share']:.1%} of the responses"
    if metrics["chosen_longer_share"] is not None:
        yield "the longer wins", f"{metrics['chosen_longer_share']:.1%} of the pairs of unequal length"
    contradictions = metrics["contradictions"]
    if contradictions["pairs"]:
        yield (
            "contradictions",
            f"{contradictions['pairs']:,} pairs are ranked both ways, {contradictions['one_rater']:,} by one rater; "
            f"{_format_rows(contradictions)}",
        )


def _tokens(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    refused = metrics["refused"]["rows"]
    yield "read by", metrics["name"] + (f", which refuses {refused:,} of the rows" if refused else "")
    if metrics["tokens"]:
        marked = f"; {metrics['marked']:,} {metrics['mark']} in total" if metrics["mark"] else ""
        yield "  tokens", _lengths(metrics["tokens"]) + marked


def _format_rows(rows: Mapping[str, Any]) -> str:
    """Format a number of rows and their first line numbers: `7 rows: lines 2, 5, 9, 11, 12, ...`."""
    from keel.data.check import num_rows

    if not rows["rows"]:
        return "none"
    more = ", ..." if rows["rows"] > NAMED_ERRORS else ""
    line = "line" if rows["rows"] == 1 else "lines"
    return f"{num_rows(rows['rows'])}: {line} {', '.join(map(str, rows['lines'][:NAMED_ERRORS]))}{more}"


def _sizes(per_row: Mapping[int, int]) -> str:
    """Format how many responses a row has: `2`, or `2 to 9 (4 in most rows)`."""
    most = max(per_row, key=lambda size: per_row[size])
    return f"{min(per_row)} to {max(per_row)} ({most} in most rows)" if len(per_row) > 1 else str(most)


def _counts(counts: Mapping[str, int]) -> str:
    """Format the first ten counts: `text: 12, chat: 3`."""
    shown = [f"{name}: {count:,}" for name, count in list(counts.items())[:10]]
    return ", ".join(shown) + (f", and {len(counts) - 10} more" if len(counts) > 10 else "")


def _lengths(lengths: Mapping[str, int]) -> str:
    return f"median {lengths['median']:,}, 95% up to {lengths['p95']:,}, longest {lengths['longest']:,}"
