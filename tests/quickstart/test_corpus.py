"""The texts are repeatable, of mixed quality, and the splits write about different things."""

import itertools
import random
import statistics

from keel.quickstart import grammar
from keel.quickstart.corpus import SPLITS, Facts, pretraining_corpus, prompts, sft_data
from keel.quickstart.gold import gold_score

PROBLEMS = {text: name for name, topic in grammar.TOPICS.items() for text in topic.problems}


def facts_of(prompt: str) -> Facts:
    words = prompt.replace(".", " ").replace("?", " ").split()
    said = grammar.sentences(prompt.removeprefix("customer:").removesuffix("agent:"))
    [topic] = [PROBLEMS[t] for t in map(grammar.sentence_template, said) if t in PROBLEMS]
    [item], [number] = set(words) & set(grammar.ITEMS), set(words) & set(grammar.NUMBERS)
    return Facts(topic, item, number)


def test_same_seed_same_texts_another_seed_others() -> None:
    assert pretraining_corpus(3, 50) == pretraining_corpus(3, 50) != pretraining_corpus(4, 50)
    assert sft_data(3, 50) == sft_data(3, 50) != sft_data(4, 50)
    assert prompts(3, 50, "rl") == prompts(3, 50, "rl") != prompts(4, 50, "rl")


def test_texts_do_not_hang_on_the_order_in_which_they_are_asked_for() -> None:
    random.seed(1)
    before = random.getstate()
    held_out = prompts(0, 20, "held_out")
    prompts(0, 20, "ratings")
    assert prompts(0, 20, "held_out") == held_out
    assert random.getstate() == before


def test_no_two_splits_write_about_the_same_facts() -> None:
    facts = {split: {facts_of(prompt) for prompt in prompts(0, 800, split)} for split in SPLITS}
    facts["sft"] |= {facts_of(row["prompt"]) for row in sft_data(0, 800)}
    facts["sft"] |= {facts_of(text[: text.index("agent:") + 6]) for text in pretraining_corpus(0, 800)}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not facts[one] & facts[other]
    for split in SPLITS:
        assert len(facts[split]) > 80
        assert {fact.topic for fact in facts[split]} == set(grammar.TOPICS)


def test_prompts_differ_from_each_other() -> None:
    assert len(set(prompts(0, 2000, "rl"))) == 2000


def test_prompts_say_who_speaks_and_end_where_the_reply_begins() -> None:
    for prompt in prompts(0, 200, "held_out"):
        assert prompt.startswith("customer: ")
        assert prompt.endswith(" agent:")
        assert prompt == prompt.lower()
        assert 8 <= len(prompt.split()) <= 26


def test_replies_are_mediocre_and_far_apart() -> None:
    scores = [gold_score(row["prompt"], row["completion"]) for row in sft_data(0, 2000)]
    assert 2 < statistics.fmean(scores) < 4.5
    assert statistics.pstdev(scores) > 3
    assert max(scores) == 10
    assert min(scores) < -4


def test_rows_hold_texts_and_nothing_of_the_judge() -> None:
    for row in sft_data(0, 300):
        assert set(row) == {"prompt", "completion"}
        for word in " ".join(row.values()).replace(".", " ").split():
            assert not any(character.isdigit() for character in word) or word in grammar.NUMBERS


def test_in_pretraining_the_customer_speaks_after_the_end_of_the_reply() -> None:
    answers = {*grammar.RESPONSES_TO_ACTION.values(), *grammar.RESPONSES_TO_NUMBER.values()}
    answers |= {*grammar.RESPONSES_TO_MANNERS.values(), grammar.RESPONSE_TO_FILLERS}
    for text in pretraining_corpus(0, 200):
        dialogue, end, answer = text.partition("</s> ")
        assert " agent: " in dialogue
        assert end
        assert answer
        assert set(grammar.sentences(answer)) <= answers
        assert not set(grammar.sentences(dialogue)) & answers
