import keel

pairs = [
    {"prompt": "A word for cold? ", "chosen": "icy", "rejected": "warm"},
    {"prompt": "A word for big? ", "chosen": "large", "rejected": "small"},
]
result = keel.dpo({"output": "runs/dpo-python", "model": "MODEL", "data": {"eval_fraction": 0}}, data=pairs)
print(result.model, result.metrics)
