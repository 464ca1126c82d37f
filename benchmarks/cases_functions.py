"""Reward functions of the cases. Run as a program, this file writes the prompts of the cases."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from keel.quickstart import corpus, grammar
from keel.quickstart.gold import gold_parts, gold_score


def people(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Return the hidden gold score of the quickstart, from -13 to 10. It represents the opinion of people."""
    return [gold_score(prompt, answer) for prompt, answer in zip(prompts, completions, strict=True)]


def style(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Return the parts of the gold score about style, manners and fluency: from -6 to 4."""
    parts = [gold_parts(prompt, answer) for prompt, answer in zip(prompts, completions, strict=True)]
    return [part.manners + part.fluency for part in parts]


def thanks(completions: list[str], **columns: Any) -> list[float]:
    """Return a point for each thanks: a rule as people write it."""
    return [float(answer.count("thank you")) for answer in completions]


def thanked(completions: list[str], **columns: Any) -> list[float]:
    """Return one point for a response that contains thanks: the same rule with a bound."""
    return [float("thank you" in answer) for answer in completions]


def with_topics(prompts: Iterable[str]) -> list[dict[str, str]]:
    problems = {problem: topic for topic, known in grammar.TOPICS.items() for problem in known.problems}
    rows = []
    for prompt in prompts:
        said = map(grammar.sentence_template, grammar.sentences(prompt.removeprefix(grammar.CUSTOMER)))
        rows.append({"prompt": prompt, "topic": next(problems[sentence] for sentence in said if sentence in problems)})
    return rows


def write(path: str, rows: Iterable[dict[str, str]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    write("prompts.jsonl", with_topics(corpus.prompts(0, 1_500, "rl")))
    write("held_out.jsonl", with_topics(corpus.prompts(0, 150, "held_out")))
