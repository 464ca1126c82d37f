import keel

result = keel.train(
    {
        "output": "runs/keel-python",
        "steps": 8,
        "policy": {"model": "runs/quickstart/sft/model"},
        "prompts": {"path": "runs/quickstart/data/rl.jsonl"},
        "rewards": [{"model": "runs/quickstart/reward/model"}],
        "rollout": {"batch_size": 64, "max_response_tokens": 40},
        "algorithm": {"kl_coef": 0.03, "minibatch_size": 16, "update_epochs": 4},
        "optim": {"learning_rate": 3e-4},
    }
)
print(result.model, result.metrics["objective/scores"])
