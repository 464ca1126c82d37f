import keel


def cheerful(prompts, completions, **columns):
    return [text.count("happy") / (1 + len(text.split())) for text in completions]


keel.train(
    {"output": "runs/cheerful", "policy": {"model": "MODEL"}, "prompts": {"path": "prompts.jsonl"}}, scorers=[cheerful]
)
