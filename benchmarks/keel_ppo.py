"""Run keel's PPO on one task: python keel_ppo.py TASK.json RESULT.json [POLICY_FOLDER] [dotted.setting=value ...]"""

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from memory import peak_mb
from tasks import Task

import keel


def settings(task: Task, output: str, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Return the settings of the run. `changes` are further dotted settings, `key=value`."""
    run: dict[str, Any] = {
        "output": output,
        "seed": task.seed,
        "steps": task.steps,
        "policy": {"model": task.policy},
        "prompts": {"path": task.prompts},
        "rewards": [{"model": task.reward}],
        "critic": {"sharing": "separate"},
        "rollout": {"batch_size": task.batch_size, "max_response_tokens": task.max_response_tokens},
        "algorithm": {
            "name": "ppo",
            "kl_coef": task.kl_coef,
            "update_epochs": task.update_epochs,
            "minibatch_size": task.batch_size // task.minibatches,
            "value_coef": 0.1,
            "value_clip_range": 0.2,
        },
        "optim": {"learning_rate": task.learning_rate, "critic_learning_rate": task.learning_rate},
        "log": {"rollouts_per_step": 0},
        "checkpoint": {"every": 0},
    }
    return changed(run, changes)


def changed(run: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """Set further dotted settings, `key=value`, in the settings of a run."""
    for change in changes:
        key, value = change.split("=", 1)
        *sections, name = key.split(".")
        place: Any = run
        for section in sections:
            place = place[int(section)] if isinstance(place, list) else place.setdefault(section, {})
        place[name] = yaml.safe_load(value)
    return run


def main(task_file: str, result_file: str, policy_folder: str = "", *changes: str) -> None:
    import transformers  # noqa: F401  (counted as idle memory, as on the other side)

    task = Task.read(task_file)
    torch.set_num_threads(task.threads)
    idle = peak_mb()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        keel.train(settings(task, str(output), changes))
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        if policy_folder:
            shutil.copytree(output / "policy", policy_folder, dirs_exist_ok=True)
    steps = [
        {
            "sample": line["time/sample_seconds"],
            "score and targets": line["time/score_seconds"] + line["time/targets_seconds"],
            "update": line["time/update_seconds"],
            "step": line["time/step_seconds"],
            "tokens": round(line["perf/tokens_per_second"] * line["time/step_seconds"]),
            "score": line["objective/scores"],
            "kl": line["objective/kl"],
        }
        for line in lines
    ]
    Path(result_file).write_text(json.dumps({"steps": steps, "peak_mb": peak_mb(), "idle_mb": idle}))


if __name__ == "__main__":
    main(*sys.argv[1:])
