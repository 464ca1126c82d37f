def cheerful(prompts, completions, completion_ids, **columns):
    return [float(text.count("!")) for text in completions]
