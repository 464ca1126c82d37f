"""Rank the responses of the quickstart, by a simulated rater or by the user in the web page."""

import random
from pathlib import Path

from keel.config import QuickstartConfig, RankConfig, parse
from keel.data.items import read_unranked_responses
from keel.errors import DataError
from keel.interrupts import clear_interrupt
from keel.quickstart.raters import rank_everything
from keel.ranking.export import export, json_lines
from keel.ranking.judgements import Judgement
from keel.ranking.store import Store
from keel.run.folder import write_atomic
from keel.web.rank.serve import serve_ranking

INSTRUCTIONS = """\
You are the customer. Rank the replies by how much each would help you, best first.
A good reply is about your problem, solves it, names the right order, and is kind.
"""


def rank_responses(config: QuickstartConfig, responses: Path, target: Path) -> str:
    """Have the responses ranked, write the rankings to `target`, and return a summary in words.

    Raises DataError if there is no ranking.
    """
    store = Store.open(str(target.with_name("ratings.db")), seed=config.seed)
    try:
        store.add_items(read_unranked_responses(str(responses)))
        if config.human:
            rank_in_browser(store, config)
        else:
            store.add_raters(["simulated"])
            rank_everything(store, "simulated", random.Random(f"ratings {config.seed}"))
        judgements = store.judgements()
    finally:
        store.close()
    rows, counts = export(judgements, "rankings", aggregate=False)
    if not rows:
        raise DataError("there are no rankings", where=config.output, fix="rank at least one item in the page")
    write_atomic(target, json_lines(rows))
    return (
        f"{counts['rankings']:,} rankings of {len(rows[0]['responses'])} responses, "
        f"{tied_share(judgements):.0%} with ties"
    )


def rank_in_browser(store: Store, config: QuickstartConfig) -> None:
    """Serve the page until there are enough rankings. Ctrl-C continues with the rankings so far."""
    store.add_raters(["you"])
    print(f"rank {config.human_rankings} replies in the page below; Ctrl-C continues with fewer", flush=True)
    instructions = Path(config.output) / "instructions.txt"
    write_atomic(instructions, INSTRUCTIONS)
    serve_ranking(
        store,
        parse(RankConfig, {"raters": ["you"], "instructions": str(instructions)}),
        until=lambda: store.num_judgements() >= config.human_rankings,
    )
    # Ctrl-C ends the page only; the quickstart continues with its next stage.
    clear_interrupt()


def tied_share(judgements: list[Judgement]) -> float:
    """Return the share of rankings in which two responses have the same rank."""
    rankings = [[rank for rank in judgement.ranks if rank is not None] for judgement in judgements if judgement.ranks]
    return sum(len(set(ranks)) < len(ranks) for ranks in rankings) / len(rankings)
