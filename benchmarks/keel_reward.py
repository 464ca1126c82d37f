"""Train a reward model with keel on one task: python keel_reward.py TASK.json RESULT.json"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from memory import peak_mb


def main(task_file: str, result_file: str) -> None:
    import transformers  # noqa: F401  (counted as idle memory, as on the other side)

    from keel.config import RewardConfig, parse
    from keel.supervised import loop as supervised
    from keel.supervised.reward import reward

    job = json.loads(Path(task_file).read_text())
    torch.set_num_threads(job["threads"])
    idle, spent, update = peak_mb(), [0.0], supervised.update

    def timed(*given: Any) -> dict[str, float]:
        start = time.perf_counter()
        metrics = update(*given)
        spent[0] += time.perf_counter() - start
        return metrics

    supervised.update = timed
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "model": job["model"],
            "data": {"path": job["pairs"], "eval_path": job["held_out"]},
            "output": f"{folder}/run",
            "seed": job["seed"],
            "epochs": job["epochs"],
            "batch_size": job["batch_size"],
            "max_tokens": job["max_tokens"],
            "center_coef": job["center_coef"],
            "optim": {"learning_rate": job["learning_rate"], "schedule": "linear"},
            "checkpoint": {"every": 0},
        }
        figures = reward(parse(RewardConfig, values))
    result = {"seconds": spent[0], "accuracy": figures["accuracy"], "peak_mb": peak_mb(), "idle_mb": idle}
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
