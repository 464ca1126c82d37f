"""Let people rank responses in a web page: each rater gets a private link, and you get one to the statistics.

Every ranking is on the disk before it is acknowledged. Stop with Ctrl-C, and continue with the same command.

example:
  keel rank responses.jsonl --raters anna --raters ben --overlap 2
  keel rank --stats
  keel rank --export rankings.jsonl
  keel rank --backup ratings-monday.db
"""

import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keel.cli.settings import read_command
from keel.config import RankConfig
from keel.errors import ConfigError

if TYPE_CHECKING:
    from keel.ranking.store import Store


def run(arguments: list[str]) -> dict[str, Any]:
    """Returns the figures, what was exported, or how much is ranked when the pages close."""
    command = read_command("rank", RankConfig, arguments, str(__doc__), flags=("stats",), plain="answers")
    settings = command.settings
    if command.stats:
        return _stats(settings)
    if settings.export is not None:
        return _export(settings, settings.export)
    if settings.backup is not None:
        return _backup(settings, settings.backup)
    return _rank(settings)


def _rank(settings: RankConfig) -> dict[str, Any]:
    from keel.data.items import in_pairs, read_unranked_responses
    from keel.web.rank.serve import check_rank_settings, serve_ranking

    if settings.answers is None:
        _must_exist(settings.store, "give answers to begin it: keel rank answers.jsonl")
    rows = read_unranked_responses(settings.answers) if settings.answers is not None else []
    check_rank_settings(settings)
    with closing(_opened(settings.store, settings.overlap, settings.seed)) as store:
        known = store.remember("mode", None)
        if known not in (None, settings.mode) and "mode" in settings.model_fields_set:
            raise ConfigError(
                f"the store holds {known}; both in one study say the same twice", "mode", "begin another store"
            )
        mode = store.remember("mode", known or settings.mode)
        given = list(in_pairs(rows, settings.seed)) if mode == "pairs" else rows
        new = store.add_items(given)
        alike = sum(len(set(row.responses)) < len(row.responses) for row in given)
        if alike:
            print(f"{alike} of {len(given)} items hold a response twice; the rating page says so", flush=True)
        if "raters" in settings.model_fields_set or not store.raters():
            store.add_raters(settings.raters)
        items, before = store.num_items(), store.num_judgements()
        print(f"{settings.store}: {items} items ({new} new), {before} rankings", flush=True)
        if store.overlap > len(store.raters()):
            print(f"each item wants {store.overlap} raters; there are only {len(store.raters())}", flush=True)
        serve_ranking(store, settings)
        done = store.num_judgements()
    print(f"stopped; {done} rankings in {settings.store}; go on with the same command")
    return {"rankings": done, "store": settings.store}


def _stats(settings: RankConfig) -> dict[str, Any]:
    from keel.cli.ratings import print_stats
    from keel.ranking.agreement import summary

    _must_exist(settings.store, "begin it: keel rank answers.jsonl")
    with closing(_opened(settings.store)) as store:
        metrics = summary(store.judgements(), store.items(), store.raters(), store.overlap)
    print_stats(metrics)
    return metrics


def _export(settings: RankConfig, path: str) -> dict[str, Any]:
    from keel.cli.ratings import write_export

    _must_exist(settings.store, "begin it: keel rank answers.jsonl")
    if Path(path).resolve() == Path(settings.store).resolve():
        raise ConfigError("this is the store itself", "export", "choose another file")
    with closing(_opened(settings.store)) as store:
        written = write_export(store.judgements(), path, settings.form, settings.aggregate)
    counts = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in written.items())
    following = (
        f"; next: keel reward --data.path {path} --model MODEL" if path.endswith(".jsonl") and written["rows"] else ""
    )
    print(f"{path}: {counts}{following}")
    return {**written, "output": path}


def _backup(settings: RankConfig, path: str) -> dict[str, Any]:
    from keel.ranking.database import StoreError

    _must_exist(settings.store, "begin it: keel rank answers.jsonl")
    if os.path.lexists(path):
        raise ConfigError(f"{path} exists", "backup", "choose another name")
    with closing(_opened(settings.store)) as store:
        try:
            store.backup(path)
        except StoreError:
            raise
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}", "backup", "choose another file") from error
        done = store.num_judgements()
    print(f"{path}: a copy of {settings.store}, {done} rankings")
    return {"rankings": done, "output": path}


def _opened(path: str, overlap: int | None = None, seed: int = 0) -> "Store":
    from keel.ranking.store import Store
    from keel.terminal import tell

    store = Store.open(path, overlap, seed)
    if store.database.left_over is not None:
        tell(f"{path}: the log beside it was of another file, and is now {store.database.left_over}")
    return store


def _must_exist(store: str, fix: str) -> None:
    if not Path(store).exists():
        raise ConfigError("no such store", where=store, fix=fix)
