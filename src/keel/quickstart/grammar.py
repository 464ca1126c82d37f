"""The language of the example: templates of every sentence that a customer or an agent can write.

`{item}` and `{number}` are slots. A sentence is in lower case and ends in "." or "?"; the only other mark is ",".
"""

import re
from dataclasses import dataclass

CUSTOMER = "customer:"
AGENT = "agent:"

ITEMS = ("lamp", "kettle", "coat", "radio", "chair", "clock", "tent", "bike", "drill", "piano")
NUMBERS = tuple(str(1037 + 733 * i) for i in range(8))  # four digits each, one word each


@dataclass(frozen=True)
class Topic:
    """Sentences with which customers state a problem, and with which an agent who understood it solves it."""

    problems: tuple[str, ...]
    actions: tuple[str, ...]


# Problem and action of a topic share a word, mostly its name, so that a model of few layers can match them.
TOPICS = {
    "late": Topic(
        ("my {item} is late.", "the {item} is a week late.", "why is my {item} late?"),
        ("the late {item} comes tomorrow.", "i will trace the late {item}.", "the late {item} is on its way."),
    ),
    "broken": Topic(
        ("my {item} is broken.", "the {item} arrived broken.", "i got a broken {item}."),
        ("i will replace the broken {item}.", "we will repair the broken {item}.", "please return the broken {item}."),
    ),
    "wrong": Topic(
        ("this is the wrong {item}.", "you sent the wrong {item}.", "i got the wrong {item}."),
        ("i will exchange the wrong {item}.", "we will collect the wrong {item}.", "please keep the wrong {item}."),
    ),
    "refund": Topic(
        ("please refund the {item}.", "i want a refund for the {item}.", "where is my {item} refund?"),
        ("i will refund the {item}.", "the {item} refund is paid.", "you get a refund for the {item}."),
    ),
    "cancel": Topic(
        ("please cancel the {item}.", "can i cancel the {item}?", "i want to cancel my {item}."),
        ("i will cancel the {item}.", "we can cancel the {item} now.", "you can cancel the {item} any time."),
    ),
}

GREETINGS = ("hello.", "hi.", "good morning.", "dear team.")
MOODS = ("i am upset.", "i am worried.", "i am tired.", "it is urgent.")
REFERENCES = ("order {number}.", "it is order {number}.", "my order is {number}.")

OPENINGS = {
    "polite": ("thank you for writing.", "i am happy to help.", "dear customer.", "good to hear you."),
    "curt": ("what now?", "yes.", "you again?"),
}
MENTIONS = ("i found order {number}.", "i see order {number}.", "this is order {number}.")
SHRUGS = ("i do not know.", "that is not my job.", "please wait.", "we will see.")
FILLERS = (
    "our shop is ten years old.",
    "the weather is nice today.",
    "many people work here.",
    "we sell a lot of things.",
    "i had soup for lunch.",
    "our new page is good.",
)
CLOSINGS = {
    "polite": ("have a nice day.", "please write again.", "all the best.", "thank you for your trust."),
    "curt": ("bye.", "do not write again."),
}

# A customer's response to a reply.
RESPONSES_TO_ACTION = {"right": "that helps.", "wrong": "not that.", "shrug": "no help."}
RESPONSES_TO_NUMBER = {"right": "right order.", "wrong": "wrong order.", "none": "which order?"}
RESPONSES_TO_MANNERS = {"polite": "kind.", "curt": "rude.", "none": "well."}
RESPONSE_TO_FILLERS = "too long."


def sentences(text: str) -> list[str]:
    """Split a text into sentences. Text after the last "." or "?" is a sentence too."""
    return [each.strip() for each in re.findall(r"[^.?]+[.?]?|[.?]", text) if each.strip()]


def sentence_template(sentence: str) -> str:
    """Return the template of a sentence: its item and number are replaced by slots."""
    words = re.findall(r"\w+|[^\w\s]", sentence)
    slots = ["{item}" if word in ITEMS else "{number}" if word in NUMBERS else word for word in words]
    return re.sub(r" (?=[.,?:])", "", " ".join(slots))


def grammar_words() -> list[str]:
    """Return every word and punctuation mark of the grammar, sorted."""
    templates = [CUSTOMER, AGENT, *GREETINGS, *MOODS, *REFERENCES, *MENTIONS, *SHRUGS, *FILLERS, RESPONSE_TO_FILLERS]
    templates += [text for pools in (OPENINGS, CLOSINGS) for pool in pools.values() for text in pool]
    templates += [text for topic in TOPICS.values() for text in topic.problems + topic.actions]
    for responses in (RESPONSES_TO_ACTION, RESPONSES_TO_NUMBER, RESPONSES_TO_MANNERS):
        templates += responses.values()
    words = set(re.findall(r"\w+|[^\w\s]", " ".join(templates).replace("{item}", "").replace("{number}", "")))
    return sorted(words | set(ITEMS) | set(NUMBERS))
