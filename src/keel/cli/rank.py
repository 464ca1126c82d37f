"""Let people rank responses in a web page: each rater gets a private link, and you get one to the statistics.

Every ranking is written to disk before the page confirms it. Stop with Ctrl-C, and continue with the same command.

example:
  keel rank responses.jsonl --raters anna --raters ben --overlap 2
  keel rank --stats
  keel rank --export rankings.jsonl
  keel rank --judge.url http://HOST/v1 --judge.model M --judge.rubric R.txt
  keel rank --backup ratings-monday.db
"""

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keel.cli.help import Verb
from keel.cli.settings import read_command
from keel.config import RankConfig
from keel.config.judge import RaterJudge
from keel.errors import ConfigError
from keel.terminal import literal

if TYPE_CHECKING:
    from keel.data.items import UnrankedResponses
    from keel.ranking.store import Store


VERB = Verb("rank", RankConfig, str(__doc__), flags=("stats",), positional="answers")
SHOWN_REASONS = 3
"""Number of reasons to print for items without a verdict"""
CREATE_STORE = "create it: keel rank responses.jsonl"


def run(arguments: list[str]) -> dict[str, Any]:
    """Serve the pages, or with a flag print statistics, export or back up. Return the counts."""
    command = read_command(VERB, arguments)
    settings = command.settings
    if command.stats:
        return _stats(settings)
    if settings.export is not None:
        return _export(settings, settings.export)
    if settings.backup is not None:
        return _backup(settings, settings.backup)
    if settings.judge is not None:
        return _rank_with_judge(settings, settings.judge)
    return _rank(settings)


def _rank(settings: RankConfig) -> dict[str, Any]:
    from keel.web.rank.serve import check_rank_settings, serve_ranking

    rows = _read_answers(settings)
    check_rank_settings(settings)
    with closing(_open_store(settings.store, settings.overlap, settings.seed)) as store:
        _add_items(store, settings, rows)
        # Raters of an earlier call stay, so the default name is added to a new store only.
        if "raters" in settings.model_fields_set or not store.raters():
            store.add_raters(settings.raters)
        if store.overlap > len(store.raters()):
            print(f"each item needs {store.overlap} raters, but there are only {len(store.raters())}", flush=True)
        serve_ranking(store, settings)
        num_rankings = store.num_judgements()
    print(f"stopped; {num_rankings} rankings in {settings.store}; continue with the same command")
    return {"rankings": num_rankings, "store": settings.store}


def _rank_with_judge(settings: RankConfig, judge_settings: RaterJudge) -> dict[str, Any]:
    """Let a judge rank all items that it has not ranked, and report its agreement with the people."""
    from keel.judge.judge import Judge
    from keel.ranking.agreement import summary
    from keel.ranking.judge_rater import rank_with_judge

    rows = _read_answers(settings)
    judge, name = Judge(judge_settings), judge_settings.name or judge_settings.label
    with closing(_open_store(settings.store, settings.overlap, settings.seed)) as store:
        _add_items(store, settings, rows)
        num_ranked, reasons = rank_with_judge(
            store, judge, name, lambda done, total: print(f"{name}: {done} of {total}", flush=True)
        )
        stats = summary(store.judgements(), store.items(), store.raters(), store.overlap, store.judges())
    usage, row = judge.take_usage(), next(row for row in stats["judges"] if row["name"] == name)
    spent = f"{usage.requests:.0f} requests, {usage.cached:.0f} from the cache, {usage.cost:.4g} spent"
    print(f"{name}: {num_ranked} items ranked, {len(reasons)} without a verdict; {spent}")
    for reason, count in Counter(reasons).most_common(SHOWN_REASONS):
        print(f"{name}: {count} items without a verdict: {literal(reason)}")
    print(f"{name}: {_agreement_text(row['agreement'])}")
    counts = {"ranked": num_ranked, "no_verdict": len(reasons)}
    return {**counts, **vars(usage), "agreement": row["agreement"], "store": settings.store}


def _read_answers(settings: RankConfig) -> list["UnrankedResponses"]:
    """Read the rows before the store is opened, so that a mistake creates no store."""
    from keel.data.items import read_unranked_responses

    if settings.answers is None:
        _check_exists(settings.store)
        return []
    return read_unranked_responses(settings.answers)


def _add_items(store: "Store", settings: RankConfig, rows: list["UnrankedResponses"]) -> None:
    """Add the rows that the store does not have, in the study's mode."""
    from keel.data.items import in_pairs

    stored_mode = store.remember("mode", None)
    if stored_mode not in (None, settings.mode) and "mode" in settings.model_fields_set:
        # The pairs of a ranking repeat what it contains already.
        raise ConfigError(
            f"the store holds {stored_mode}; both in one store would count preferences twice",
            "mode",
            "leave out --mode, or use another --store",
        )
    mode = store.remember("mode", stored_mode or settings.mode)
    items = list(in_pairs(rows, settings.seed)) if mode == "pairs" else rows
    num_new = store.add_items(items)
    with_equal = sum(len(set(item.responses)) < len(item.responses) for item in items)
    if with_equal:
        print(f"{with_equal} of {len(items)} items hold a response twice; the rating page marks them", flush=True)
    num_items, num_rankings = store.num_items(), store.num_judgements()
    print(f"{settings.store}: {num_items} items ({num_new} new), {num_rankings} rankings", flush=True)


def _stats(settings: RankConfig) -> dict[str, Any]:
    from keel.cli.ratings import print_stats
    from keel.ranking.agreement import summary

    _check_exists(settings.store)
    with closing(_open_store(settings.store)) as store:
        metrics = summary(store.judgements(), store.items(), store.raters(), store.overlap, store.judges())
    print_stats(metrics)
    return metrics


def _export(settings: RankConfig, path: str) -> dict[str, Any]:
    from keel.cli.ratings import write_export
    from keel.ranking.agreement import summary

    _check_exists(settings.store)
    if Path(path).resolve() == Path(settings.store).resolve():
        raise ConfigError("this is the store itself", "export", "choose another file name")
    with closing(_open_store(settings.store)) as store:
        rankings, judges = store.judgements(), store.judges()
        rows = summary(rankings, store.items(), store.raters(), store.overlap, judges)["judges"] if judges else []
    if settings.judges == "exclude":
        rankings = [ranking for ranking in rankings if ranking.rater not in judges]
    agreement = {row["name"]: {"agreement": row["agreement"]["value"]} for row in rows}
    counts = write_export(rankings, path, settings.form, settings.aggregate, agreement)
    for row in rows:
        kept = "counted as a rater" if settings.judges == "include" else "left out; --judges include counts it"
        print(f"judge {row['name']}: {_agreement_text(row['agreement'])}; {kept}")
    counted = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in counts.items())
    can_train = path.endswith(".jsonl") and counts["rows"]
    print(f"{path}: {counted}" + (f"; next: keel reward --data.path {path} --model MODEL" if can_train else ""))
    return {**counts, "output": path}


def _agreement_text(agreement: Mapping[str, Any]) -> str:
    if agreement["value"] is None:
        return "no pair that a person ranked too"
    return f"agrees with people on {agreement['value']:.0%} of {agreement['pairs']} pairs"


def _backup(settings: RankConfig, path: str) -> dict[str, Any]:
    from keel.ranking.database import StoreError

    _check_exists(settings.store)
    if os.path.lexists(path):
        raise ConfigError(f"{path} exists", "backup", "choose another file name")
    with closing(_open_store(settings.store)) as store:
        try:
            store.backup(path)
        except StoreError:  # an OSError too, but about the store and not about `path`
            raise
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}", "backup", "choose another file name") from error
        num_rankings = store.num_judgements()
    print(f"{path}: a copy of {settings.store}, {num_rankings} rankings")
    return {"rankings": num_rankings, "output": path}


def _open_store(path: str, overlap: int | None = None, seed: int = 0) -> "Store":
    from keel.ranking.store import Store
    from keel.terminal import print_line

    store = Store.open(path, overlap, seed)
    if store.database.left_over is not None:
        print_line(f"{path}: the log beside it belonged to another file; it was renamed to {store.database.left_over}")
    return store


def _check_exists(store: str) -> None:
    if not Path(store).exists():
        raise ConfigError("no such store", where=store, fix=CREATE_STORE)
