"""Write the desk's data, which in your place comes from your own systems: python make_data.py FOLDER

The world is that of `keel quickstart`: customers who want one of five things, agents of mixed quality. What is learned
from and what judges never share a case (topic, item and order number): no model passes by knowing the answers.
"""

import json
import random
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from keel.quickstart import corpus, grammar
from keel.quickstart.tokenizer import build_tokenizer, tiny_llama

SEED = 0
TOPICS = {problem: topic for topic, known in grammar.TOPICS.items() for problem in known.problems}


def main(folder: Path) -> None:
    (folder / "data").mkdir(parents=True)
    held_out = corpus.prompts(SEED, 300, "held_out")
    files: dict[str, Iterable[Mapping[str, str]]] = {
        "texts": ({"text": text} for text in corpus.pretraining_corpus(SEED, 14_000)),
        "dialogues": corpus.sft_data(SEED, 2_400),
        "ratings": with_topics(corpus.prompts(SEED, 1_200, "ratings")),
        "rl": with_topics(corpus.prompts(SEED, 1_500, "rl")),
        "watch": with_topics(held_out[:100]),  # looked at while the policy learns
        "release": with_topics(held_out[100:]),  # looked at once, by the gate
        "week1": with_topics(a_week(1, 300)),
        "week2": with_topics(map(after_a_storm, a_week(2, 300))),
        "week3": with_topics(map(after_a_storm, a_week(3, 300))),
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "data" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    tiny_llama(folder / "untrained", build_tokenizer(), SEED)


def with_topics(prompts: Iterable[str]) -> list[dict[str, str]]:
    return [{"prompt": prompt, "topic": topic_of(prompt)} for prompt in prompts]


def topic_of(prompt: str) -> str:
    """What the customer wants; in your place, what your desk's own routing said."""
    return next(TOPICS[problem] for problem in map(grammar.sentence_template, said_in(prompt)) if problem in TOPICS)


def said_in(prompt: str) -> list[str]:
    return grammar.sentences(prompt.removeprefix(grammar.CUSTOMER).removesuffix(grammar.AGENT))


def a_week(number: int, count: int) -> list[str]:
    """What customers write once the model answers: about orders of every split."""
    every = [prompt for split in corpus.SPLITS for prompt in corpus.prompts(SEED + 100 * number, count, split)]
    return random.Random(f"week {number}").sample(every, count)


def after_a_storm(prompt: str) -> str:
    """The same in another week: most want a refund now, and nobody is calm."""
    rng, said = random.Random(prompt), said_in(prompt)
    if rng.random() < 0.6:
        item = next(item for item in grammar.ITEMS if item in prompt)
        said = [f"where is my {item} refund?" if grammar.sentence_template(s) in TOPICS else s for s in said]
    return " ".join([grammar.CUSTOMER, *said, *rng.sample(grammar.MOODS, 3), grammar.AGENT])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
