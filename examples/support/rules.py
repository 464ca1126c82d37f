"""A reward function for what a program can check with certainty. Use it in training and in the gate."""

import re

ORDER = re.compile(r"\b\d{4}\b")


def wrong_order(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Return 1 for a response that names an order number which is not in the prompt, else 0."""
    pairs = zip(prompts, completions, strict=True)
    return [float(not set(ORDER.findall(response)) <= set(ORDER.findall(prompt))) for prompt, response in pairs]
