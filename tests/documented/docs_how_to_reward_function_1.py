def exact(completions, answer, **columns):
    """Score 1 where the response contains the answer of its row, else 0."""
    return [float(right in text) for text, right in zip(completions, answer, strict=True)]
