import keel


def score(response: str) -> float:
    return float(response.count("thank"))


trainer = keel.PolicyTrainer.from_config(
    {
        "output": "runs/step",
        "steps": 4,
        "policy": {"model": "runs/quickstart/sft/model"},
        "prompts": {"path": "runs/quickstart/data/rl.jsonl"},
        "rollout": {"batch_size": 16, "max_response_tokens": 40},
        "optim": {"learning_rate": 1e-4},
    }
)
for _ in range(4):
    rollouts = trainer.sample()  # or trainer.sample(["a prompt", "another prompt"])
    metrics = trainer.update(rollouts, [score(text) for text in rollouts.texts])
    print(metrics["objective/scores"], metrics["objective/kl"])
trainer.save("runs/step/policy")
