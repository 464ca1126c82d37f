"""Fine-tune a reward model by TRL's RewardTrainer, in the environment with TRL: python trl_truthfulqa.py TASK RESULT"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer


def main(task_file, result_file):
    task = json.loads(Path(task_file).read_text())
    torch.set_num_threads(task["threads"])
    torch.manual_seed(task["seed"])  # the head's start
    model = AutoModelForSequenceClassification.from_pretrained(task["model"], num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    data = load_dataset("json", data_files={"train": task["pairs"], "held_out": task["held_out"]})
    data = data.map(lambda row: {"prompt": row["prompt"] + "\n"})  # a pair's texts are prompt + answer
    with tempfile.TemporaryDirectory() as output:
        trainer = RewardTrainer(
            model=model,
            args=settings(task, output),
            processing_class=tokenizer,
            train_dataset=data["train"],
            eval_dataset=data["held_out"],
        )
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
        own = trainer.evaluate()
    result = {"seconds": seconds, "accuracy": own["eval_accuracy"], "loss": own["eval_loss"]}
    rows = [json.loads(line) for line in Path(task["answers"]).read_text().splitlines()]
    result["scores"] = [score(trainer.model, tokenizer, row["prompt"], row["responses"]) for row in rows]
    Path(result_file).write_text(json.dumps(result))


def settings(task, output):
    """Return TRL's defaults except passes and learning rate. float32 without recomputation is fastest on a CPU."""
    return RewardConfig(
        output_dir=output,
        num_train_epochs=task["epochs"],
        learning_rate=task["learning_rate"],
        seed=task["seed"],
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


@torch.no_grad()
def score(model, tokenizer, prompt, responses):
    """Return scores of the responses, encoded as in training: with the end token that TRL appends."""
    model.eval()
    texts = [f"{prompt}\n{response}{tokenizer.eos_token}" for response in responses]
    return model(**tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")).logits[:, 0].tolist()


if __name__ == "__main__":
    main(*sys.argv[1:])
