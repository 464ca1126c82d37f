"""What a program can check for certain, as a reward function: it belongs into the training and into the gate."""

import re

ORDER = re.compile(r"\b\d{4}\b")


def wrong_order(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """1 for an answer that names an order which is not the customer's."""
    pairs = zip(prompts, completions, strict=True)
    return [float(not set(ORDER.findall(answer)) <= set(ORDER.findall(prompt))) for prompt, answer in pairs]
