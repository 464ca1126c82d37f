def short_enough(completions, limit, **columns):
    """Score 1 for a response within its limit of characters, less for each character beyond it."""
    texts = [messages[0]["content"] for messages in completions]
    return [1.0 - max(0, len(text) - most) / most for text, most in zip(texts, limit, strict=True)]


def polite(completions, **columns):
    return [float("please" in messages[0]["content"].lower()) for messages in completions]
