"""Train a reward model with TRL on one task, in the environment with TRL: python trl_reward.py TASK.json RESULT.json"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from datasets import load_dataset
from memory import peak_mb
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer


def main(task_file, result_file):
    task = json.loads(Path(task_file).read_text())
    torch.set_num_threads(task["threads"])
    idle = peak_mb()
    torch.manual_seed(task["seed"])  # the head's start
    model = AutoModelForSequenceClassification.from_pretrained(task["model"], num_labels=1)
    data = load_dataset("json", data_files={"train": task["pairs"], "held_out": task["held_out"]})
    with tempfile.TemporaryDirectory() as output:
        args = RewardConfig(
            output_dir=output,
            per_device_train_batch_size=task["batch_size"],
            per_device_eval_batch_size=task["batch_size"],
            num_train_epochs=task["epochs"],
            learning_rate=task["learning_rate"],
            lr_scheduler_type="linear",
            center_rewards_coefficient=task["center_coef"],
            max_length=task["max_tokens"],
            seed=task["seed"],
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = RewardTrainer(
            model=model,
            args=args,
            processing_class=AutoTokenizer.from_pretrained(task["model"]),
            train_dataset=data["train"],
            eval_dataset=data["held_out"],
        )
        seconds = trainer.train().metrics["train_runtime"]
        accuracy = trainer.evaluate()["eval_accuracy"]
    result = {"seconds": seconds, "accuracy": accuracy, "peak_mb": peak_mb(), "idle_mb": idle}
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
