"""Who ranks the quickstart's answers: a simulated rater, or you in the web page. Both through one store."""

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
A good reply is about what was asked, does what was wanted, names the right order, and is kind.
"""


def rank_responses(config: QuickstartConfig, responses: Path, target: Path) -> str:
    """Have the answers ranked and write the rankings; says how many there are. Raises DataError without any."""
    store = Store.open(str(target.with_name("ratings.db")), seed=config.seed)
    try:
        store.add_items(read_unranked_responses(str(responses)))
        if config.human:
            by_hand(store, config)
        else:
            store.add_raters(["simulated"])
            rank_everything(store, "simulated", random.Random(f"ratings {config.seed}"))
        judgements = store.judgements()
    finally:
        store.close()
    rows, counts = export(judgements, "rankings", aggregate=False)
    if not rows:
        raise DataError("nobody ranked anything", where=config.output)
    write_atomic(target, json_lines(rows))
    return (
        f"{counts['rankings']:,} rankings of {len(rows[0]['responses'])} answers, "
        f"{tied_share(judgements):.0%} with ties"
    )


def by_hand(store: Store, config: QuickstartConfig) -> None:
    """Serve the page until enough is ranked; Ctrl-C continues with the rankings so far."""
    store.add_raters(["you"])
    print(f"rank {config.human_rankings} replies in the page below; Ctrl-C goes on with fewer", flush=True)
    instructions = Path(config.output) / "instructions.txt"
    write_atomic(instructions, INSTRUCTIONS)
    serve_ranking(
        store,
        parse(RankConfig, {"raters": ["you"], "instructions": str(instructions)}),
        until=lambda: store.num_judgements() >= config.human_rankings,
    )
    clear_interrupt()


def tied_share(judgements: list[Judgement]) -> float:
    """Share of the rankings in which two answers share a rank."""
    given = [[rank for rank in judgement.ranks if rank is not None] for judgement in judgements if judgement.ranks]
    return sum(len(set(ranks)) < len(ranks) for ranks in given) / len(given)
