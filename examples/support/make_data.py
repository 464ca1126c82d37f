"""Write the data of the example, in place of an export of your systems: python make_data.py FOLDER

The texts are those of `keel quickstart`: customers who want one of five things, agents of mixed quality. Training and
evaluation never share a case (topic, item and order number), so that no model passes by memorising responses.
"""

import json
import random
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from keel.quickstart import corpus, grammar
from keel.quickstart.tokenizer import build_tokenizer, tiny_llama

SEED = 0
TOPICS = {problem: name for name, topic in grammar.TOPICS.items() for problem in topic.problems}


def main(folder: Path) -> None:
    (folder / "data").mkdir(parents=True)
    held_out = corpus.prompts(SEED, 300, "held_out")
    files: dict[str, Iterable[Mapping[str, str]]] = {
        "texts": ({"text": text} for text in corpus.pretraining_corpus(SEED, 14_000)),
        "dialogues": corpus.sft_data(SEED, 2_400),
        "ratings": with_topics(corpus.prompts(SEED, 1_200, "ratings")),
        "rl": with_topics(corpus.prompts(SEED, 1_500, "rl")),
        "watch": with_topics(held_out[:100]),  # evaluated during training
        "release": with_topics(held_out[100:]),  # used once, by the gate
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
    """Return what the customer wants. With real data, use the result of your routing."""
    return next(
        TOPICS[problem] for problem in map(grammar.sentence_template, message_sentences(prompt)) if problem in TOPICS
    )


def message_sentences(prompt: str) -> list[str]:
    return grammar.sentences(prompt.removeprefix(grammar.CUSTOMER).removesuffix(grammar.AGENT))


def a_week(number: int, count: int) -> list[str]:
    """Return messages after the release, about cases of every split."""
    candidates = [prompt for split in corpus.SPLITS for prompt in corpus.prompts(SEED + 100 * number, count, split)]
    return random.Random(f"week {number}").sample(candidates, count)


def after_a_storm(prompt: str) -> str:
    """Change a message to one after a storm: most customers want a refund, and nobody is calm."""
    rng, sentences = random.Random(prompt), message_sentences(prompt)
    if rng.random() < 0.6:
        item = next(item for item in grammar.ITEMS if item in prompt)
        refund = f"where is my {item} refund?"
        sentences = [refund if grammar.sentence_template(each) in TOPICS else each for each in sentences]
    return " ".join([grammar.CUSTOMER, *sentences, *rng.sample(grammar.MOODS, 3), grammar.AGENT])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
