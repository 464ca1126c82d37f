"""The language of the support world: every sentence a customer or an agent can write, as templates.

`{item}` and `{number}` are slots. A sentence is lower case and ends in "." or "?"; nothing else is punctuation but ",".
"""

import re
from dataclasses import dataclass

CUSTOMER = "customer:"
AGENT = "agent:"

ITEMS = ("lamp", "kettle", "coat", "radio", "chair", "clock", "tent", "bike", "drill", "piano")
NUMBERS = tuple(str(1037 + 733 * i) for i in range(12))  # four digits each, one word each


@dataclass(frozen=True)
class Topic:
    """What customers of one topic write, and what an agent who understood them does about it."""

    problems: tuple[str, ...]
    actions: tuple[str, ...]


# Problem and action of a topic share a word, its name mostly: a reader of few layers can tell that they match.
TOPICS = {
    "late": Topic(
        ("my {item} is late.", "the {item} is a week late.", "why is my {item} so late?"),
        (
            "the late {item} will arrive tomorrow.",
            "i will trace the late {item} now.",
            "the {item} is late but on its way.",
        ),
    ),
    "broken": Topic(
        ("my {item} is broken.", "the {item} arrived broken.", "i got a broken {item}."),
        (
            "i will send a new {item} for the broken one.",
            "we will repair the broken {item} for free.",
            "please bring the broken {item} to any shop.",
        ),
    ),
    "wrong": Topic(
        ("you sent me the wrong {item}.", "the {item} has the wrong colour.", "i got the wrong {item} today."),
        (
            "i will exchange the wrong {item}.",
            "we will collect the wrong {item} tomorrow.",
            "you can swap the wrong {item} in any shop.",
        ),
    ),
    "refund": Topic(
        ("i want a refund for the {item}.", "please refund the {item}.", "where is my refund for the {item}?"),
        (
            "the refund for the {item} is on your card.",
            "i have paid the refund for the {item}.",
            "you get a full refund for the {item}.",
        ),
    ),
    "cancel": Topic(
        ("please cancel the {item}.", "can i still cancel the {item}?", "i want to cancel my {item}."),
        (
            "we can cancel the {item} for free.",
            "i will cancel the {item} now.",
            "it costs nothing to cancel the {item}.",
        ),
    ),
    "address": Topic(
        (
            "please change the address for the {item}.",
            "the address for my {item} is not right.",
            "i gave you an old address for the {item}.",
        ),
        (
            "the {item} will go to the new address.",
            "i have changed the address for the {item}.",
            "please tell me the new address for the {item}.",
        ),
    ),
}

GREETINGS = ("hello.", "hi.", "good morning.", "dear team.")
MOODS = ("i am upset.", "i am worried.", "i am tired of this.", "this is the second time.", "i am in a hurry.")
REFERENCES = (
    "it is order {number}.",
    "this is about order {number}.",
    "please look at order {number}.",
    "order {number}.",
)

OPENINGS = {
    "polite": (
        "thank you for your message.",
        "i am happy to help you.",
        "dear customer.",
        "good to hear from you.",
    ),
    "curt": ("what now?", "yes.", "you again?"),
}
MENTIONS = ("i found order {number}.", "i see order {number} here.", "this is order {number}.")
SHRUGS = ("i do not know.", "that is not my job.", "please wait.", "we will see.")
FILLERS = (
    "our shop has been here for ten years.",
    "the weather is very nice today.",
    "many people work in our house.",
    "we sell a lot of things.",
    "i had soup for lunch.",
    "the new page is very good.",
)
CLOSINGS = {
    "polite": (
        "have a nice day.",
        "please write again if you need help.",
        "all the best to you.",
        "thank you for your trust.",
    ),
    "curt": ("bye.", "do not write again."),
}

# What a customer says to a reply.
ANSWERS_TO_ACTION = {"right": "that helps.", "wrong": "i asked something else.", "shrug": "you did nothing."}
ANSWERS_TO_NUMBER = {"right": "right order.", "wrong": "wrong order.", "none": "which order?"}
ANSWERS_TO_MANNERS = {"polite": "how kind.", "curt": "how rude.", "none": "well."}
ANSWER_TO_FILLERS = "too long."


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order; what follows the last "." or "?" is one more."""
    return [part.strip() for part in re.findall(r"[^.?]+[.?]?|[.?]", text) if part.strip()]


def template_of(sentence: str) -> str:
    """The sentence with its item and number turned back into slots."""
    words = re.findall(r"\w+|[^\w\s]", sentence)
    slots = ["{item}" if word in ITEMS else "{number}" if word in NUMBERS else word for word in words]
    return re.sub(r" (?=[.,?:])", "", " ".join(slots))


def words() -> list[str]:
    """Every word and mark of the grammar, sorted."""
    templates = [CUSTOMER, AGENT, *GREETINGS, *MOODS, *REFERENCES, *MENTIONS, *SHRUGS, *FILLERS, ANSWER_TO_FILLERS]
    templates += [text for pools in (OPENINGS, CLOSINGS) for pool in pools.values() for text in pool]
    templates += [text for topic in TOPICS.values() for text in topic.problems + topic.actions]
    for answers in (ANSWERS_TO_ACTION, ANSWERS_TO_NUMBER, ANSWERS_TO_MANNERS):
        templates += answers.values()
    found = set(re.findall(r"\w+|[^\w\s]", " ".join(templates).replace("{item}", "").replace("{number}", "")))
    return sorted(found | set(ITEMS) | set(NUMBERS))
