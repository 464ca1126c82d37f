"""A reward function that keel and TRL can both call."""


def share_of_letters(completions, **columns):
    """Return the share of letters in each response."""
    return [sum(map(str.isalpha, text)) / max(1, len(text)) for text in completions]
