import keel


def short_enough(completions, **columns):
    return [1.0 - len(messages[0]["content"]) / 100 for messages in completions]


result = keel.train(
    {
        "output": "runs/short-python",
        "steps": 4,
        "policy": {"model": "MODEL"},
        "rollout": {"batch_size": 16, "max_response_tokens": 48},
        "optim": {"learning_rate": 1e-5},
    },
    scorers=[short_enough],
    prompts=[[{"role": "user", "content": "Name a fruit."}], [{"role": "user", "content": "Describe the sea."}]],
)
print(result.model, result.metrics["objective/scores"])
