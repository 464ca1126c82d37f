"""The language of the support world: every sentence a customer or an agent can write, as templates.

`{item}` and `{number}` are slots. A sentence is lower case and ends in "." or "?"; nothing else is punctuation but ",".
"""

import re
from dataclasses import dataclass

CUSTOMER = "customer:"
AGENT = "agent:"

ITEMS = ("lamp", "kettle", "coat", "radio", "chair", "clock", "tent", "bike", "drill", "piano")
NUMBERS = tuple(str(1037 + 223 * i) for i in range(40))  # four digits each, one word each


@dataclass(frozen=True)
class Topic:
    """What customers of one topic write, and what an agent who understood them does about it."""

    problems: tuple[str, ...]
    actions: tuple[str, ...]


TOPICS = {
    "late": Topic(
        (
            "my {item} has not arrived.",
            "where is my {item}?",
            "i am still waiting for the {item}.",
            "the {item} is a week late.",
            "when will my {item} come?",
        ),
        (
            "i will trace the parcel with your {item} now.",
            "your {item} will arrive tomorrow.",
            "the driver brings the {item} tomorrow.",
        ),
    ),
    "broken": Topic(
        (
            "my {item} arrived broken.",
            "the {item} does not work.",
            "the {item} stopped after one day.",
            "there is a crack in my {item}.",
            "my {item} makes a strange noise.",
        ),
        (
            "i will send a new {item} today.",
            "we will repair the {item} for free.",
            "a new {item} is on its way.",
        ),
    ),
    "wrong": Topic(
        (
            "you sent me the wrong {item}.",
            "this is not the {item} that i chose.",
            "the {item} has the wrong colour.",
            "the {item} is too small.",
            "someone else got my {item}.",
        ),
        (
            "i will exchange the {item} for the right one.",
            "we will collect the wrong {item} and bring the right one.",
            "you can swap the {item} in any shop.",
        ),
    ),
    "refund": Topic(
        (
            "i want my money back for the {item}.",
            "please refund the {item}.",
            "i sent the {item} back and got no money.",
            "you took the money for the {item} twice.",
            "the {item} was cheaper on your page.",
        ),
        (
            "i have refunded the {item}.",
            "the money for the {item} is back on your card.",
            "you get the full price of the {item} back.",
        ),
    ),
    "cancel": Topic(
        (
            "please cancel the {item}.",
            "i do not want the {item} any more.",
            "i bought the {item} by mistake.",
            "can i still stop the {item}?",
            "my wife already has a {item}.",
        ),
        (
            "i have cancelled the {item}.",
            "the {item} is cancelled and costs nothing.",
            "i stopped the {item} before it left.",
        ),
    ),
    "address": Topic(
        (
            "i moved and need the {item} at my new home.",
            "please send the {item} to another street.",
            "the address for my {item} is not right.",
            "can you bring the {item} to my office?",
            "i gave you an old address for the {item}.",
        ),
        (
            "i changed the address for the {item}.",
            "the {item} will go to the new address.",
            "please tell me the new address for the {item}.",
        ),
    ),
    "password": Topic(
        (
            "i can not log in to see my {item}.",
            "my password fails when i look for the {item}.",
            "i forgot the password and need to track the {item}.",
            "my account with the {item} is locked.",
            "your page does not let me in to pay for the {item}.",
        ),
        (
            "i have sent you a link for a new password.",
            "your account is open again.",
            "you can set a new password with the link.",
        ),
    ),
    "invoice": Topic(
        (
            "i need an invoice for the {item}.",
            "please send me the bill for the {item}.",
            "there was no paper with the {item}.",
            "my boss wants a receipt for the {item}.",
            "the invoice for the {item} has a mistake.",
        ),
        (
            "the invoice for the {item} is in your mail.",
            "i have sent you the bill for the {item}.",
            "you can print the invoice for the {item} on our page.",
        ),
    ),
    "thanks": Topic(
        (
            "the {item} is lovely.",
            "my {item} came so fast.",
            "i am very happy with the {item}.",
            "all my friends like the {item}.",
            "this is the best {item} of my life.",
        ),
        (
            "it is great that you like the {item}.",
            "i will tell the team that you like the {item}.",
            "enjoy the {item}.",
        ),
    ),
}

GREETINGS = ("hello.", "hi.", "good morning.", "dear team.")
MOODS = ("i am upset.", "i am worried.", "i am tired of this.", "this is the second time.", "i am in a hurry.")
REFERENCES = ("it is order {number}.", "this is about order {number}.", "please look at order {number}.", "order {number}.")

POLITE_OPENINGS = ("thank you for your message.", "i am happy to help you.", "dear customer.", "good to hear from you.")
CURT_OPENINGS = ("what now?", "yes.", "you again?")
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
POLITE_CLOSINGS = ("have a nice day.", "please write again if you need help.", "all the best to you.", "thank you for your trust.")
CURT_CLOSINGS = ("bye.", "do not write again.")


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
    templates = [CUSTOMER, AGENT, *GREETINGS, *MOODS, *REFERENCES, *POLITE_OPENINGS, *CURT_OPENINGS, *MENTIONS]
    templates += [*SHRUGS, *FILLERS, *POLITE_CLOSINGS, *CURT_CLOSINGS]
    templates += [text for topic in TOPICS.values() for text in topic.problems + topic.actions]
    found = set(re.findall(r"\w+|[^\w\s]", " ".join(templates).replace("{item}", "").replace("{number}", "")))
    return sorted(found | set(ITEMS) | set(NUMBERS))
