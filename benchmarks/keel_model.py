"""Measure keel on one task with a real model: python keel_model.py TASK.json RESULT.json [dotted.setting=value ...]"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from keel_ppo import changed, settings
from memory import peak_mb
from step_meter import StepMeter
from tasks import Task

HERE = Path(__file__).parent


def main(task_file: str, result_file: str, *changes: str) -> None:
    from transformers import AutoConfig

    task = Task.read(task_file)
    torch.set_num_threads(task.threads)
    idle, meter = peak_mb(), StepMeter(AutoConfig.from_pretrained(task.policy).get_text_config().vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        train = train_from_pairs if task.algorithm in ("dpo", "reward", "sft") else train_from_rewards
        peak = train(task, f"{folder}/run", meter, changes)
    Path(result_file).write_text(json.dumps({"peak_mb": peak, "idle_mb": idle, **meter.result()}))


def train_from_rewards(task: Task, output: str, meter: StepMeter, changes: tuple[str, ...]) -> float:
    """Take steps of ppo, grpo or rloo, and return the peak memory in MiB. Nothing is saved, as on the other side."""
    import keel.training.setup
    from keel.training.trainer import PolicyTrainer

    if task.full_length:
        keel.training.setup.end_token_ids = lambda *_: [-1]
    run = settings(task, output)
    run["prompts"]["chat"] = False
    if task.algorithm != "ppo":
        run["rewards"] = [{"function": f"{HERE / 'rewards.py'}:share_of_letters"}]
        run["rollout"]["group_size"] = task.group_size
        in_loss = {"kl_in": "loss", "kl_estimator": "k3"} if task.algorithm == "grpo" else {}
        run["algorithm"] |= {"name": task.algorithm, **in_loss}
    trainer = PolicyTrainer.from_config(changed(run, changes))
    for _ in range(task.steps):
        meter.phase("sample")
        rollouts = trainer.sample()
        meter.phase("score and targets")
        targets = trainer.compute_targets(trainer.score(rollouts))
        meter.phase("update")
        trainer.update_weights(targets)
        meter.end_step(int(rollouts.lengths.sum()))
    return peak_mb()


def train_from_pairs(task: Task, output: str, meter: StepMeter, changes: tuple[str, ...]) -> float:
    """Take steps of dpo, reward or sft, and return the peak memory in MiB before the result is saved."""
    import keel
    from keel.supervised import loop

    update, peak = loop.update, [0.0]

    def measured_update(*given: Any) -> dict[str, float]:
        meter.phase("update")
        metrics = update(*given)
        meter.end_step(meter.current["update"]["trained"])
        peak[0] = peak_mb()
        return metrics

    loop.update = measured_update
    run = {
        "output": output,
        "model": task.policy,
        "data": {"path": task.prompts, "eval_fraction": 0.0, "chat": False},
        "batch_size": task.batch_size,
        "optim": {"learning_rate": task.learning_rate},
    }
    {"dpo": keel.dpo, "reward": keel.reward, "sft": keel.sft}[task.algorithm](changed(run, changes))
    return peak[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
