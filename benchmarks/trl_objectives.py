"""Measure TRL 1.16's objectives on the batch of keel_objectives.py: python trl_objectives.py JOB.json RESULT.json

Each objective is the `compute_loss` of a new trainer. The samples of the gradients are written beside the job.
"""

import json
import os
import sys
from pathlib import Path

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # CPO and ORPO are experimental

import torch
import trl
from datasets import Dataset
from objective_cases import LENGTH_LIMIT
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.utils import DPODataCollatorWithPadding
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference
from trl.trainer.reward_trainer import DataCollatorForPreference as DataCollatorForScores
from trl.trainer.utils import pad

TRAINERS = {"CPO": (CPOTrainer, CPOConfig), "ORPO": (ORPOTrainer, ORPOConfig)}
TEXT = {"prompt": "Why", "chosen": " not", "rejected": " so", "completion": " not", "label": True}


def main(job_file, result_file):
    job, folder = json.loads(Path(job_file).read_text()), Path(job_file).parent
    torch.set_num_threads(job["threads"])
    batch = json.loads((folder / "batch.json").read_text())
    samples, results = {}, {}
    for case in job["cases"]:
        model = load(case, job["model"], batch)
        trainer = build_trainer(case, model, job["model"], str(folder / "trl"))
        results[case["name"]] = measure(trainer, inputs(case, batch, trainer.processing_class.pad_token_id))
        for name, weight in trainer.model.named_parameters():
            if weight.grad is not None:
                rows = weight.grad[:4] if weight.dim() > 1 else weight.grad
                samples[f"{case['name']}/{name}"] = rows.clone()
    save_file(samples, folder / "trl.safetensors")
    Path(result_file).write_text(json.dumps(results))


def load(case, name, batch):
    if case["trainer"] != "Reward":
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, dtype=torch.float32)
    with torch.no_grad():
        model.score.weight.copy_(torch.tensor(batch["scored pairs"]["head"]))
    return model


def build_trainer(case, model, name, output):
    """Build a trainer with a data set of one row, which is not read: the losses are computed on the batch."""
    kind = case["trainer"]
    trainer, config = TRAINERS.get(kind) or (getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config"))
    from_rewards = kind in ("GRPO", "RLOO")
    limits = {"max_completion_length": LENGTH_LIMIT, "num_generations": 4} if from_rewards else {}
    if kind in ("DPO", "KTO"):
        limits = {"precompute_ref_log_probs": True}
    args = config(
        output_dir=output,
        per_device_train_batch_size=8,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        **limits,
        **case["trl"],
    )
    columns = {
        "GRPO": ["prompt"],
        "RLOO": ["prompt"],
        "SFT": ["prompt", "completion"],
        "KTO": ["prompt", "completion", "label"],
    }.get(kind, ["prompt", "chosen", "rejected"])
    rows = Dataset.from_list([{column: TEXT[column] for column in columns}] * 8)
    rewards = {"reward_funcs": lambda completions, **_: [0.0] * len(completions)} if from_rewards else {}
    tokenizer = AutoTokenizer.from_pretrained(name)
    built = trainer(model=model, args=args, processing_class=tokenizer, train_dataset=rows, **rewards)
    built.current_gradient_accumulation_steps = 1
    return built


def measure(trainer, batches):
    """Compute the mean loss over the batches, and its gradient, in training mode."""
    model, total = trainer.model.train(), 0.0
    model.zero_grad(set_to_none=True)
    for each in batches:
        loss = trainer.compute_loss(model, each) / len(batches)
        loss.backward()
        total += loss.item()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    return {
        "loss": total,
        "norm": torch.nn.utils.get_total_norm(gradients).item(),
    }  # the function that Trainer clips by


def inputs(case, batch, pad_id):
    """Return the batches of the trainer's data collator: all rows together, or one by one."""
    kind, rows = case["trainer"], batch[case["rows"]]
    if kind in ("GRPO", "RLOO"):
        return [rollouts(rows, pad_id, case["on_policy"])]
    if kind == "Reward":
        return [
            DataCollatorForScores(pad_id)(rows["rows"])
        ]  # no row ends with this token, before which scores are read
    if kind == "SFT":
        return [sft_inputs(rows, pad_id)]
    if kind == "KTO":
        collator = DataCollatorForUnpairedPreference(pad_id)
    elif kind == "DPO":
        collator = DataCollatorForPreference(pad_id)
    else:
        collator, rows = DPODataCollatorWithPadding(pad_id), [labelled(row) for row in rows]
    return [collator([row]) for row in rows] if case["one_by_one"] else [collator(rows)]


def rollouts(rows, pad_id, on_policy):
    """Return what GRPO and RLOO compute from sampled responses."""
    prompts, responses = ([torch.tensor(ids) for ids in rows[name]] for name in ("prompts", "responses"))
    old = rows["current" if on_policy else "old"]
    mask = pad([torch.ones_like(ids) for ids in responses], padding_value=0)
    return {
        "prompt_ids": pad(prompts, padding_value=pad_id, padding_side="left"),
        "prompt_mask": pad([torch.ones_like(ids) for ids in prompts], padding_value=0, padding_side="left"),
        "completion_ids": pad(responses, padding_value=pad_id),
        "completion_mask": mask,
        "advantages": torch.tensor(rows["advantages"]),
        "old_per_token_logps": pad([torch.tensor(each) for each in old], padding_value=0),
        "old_logps": torch.tensor([sum(each) for each in old]),
        "ref_per_token_logps": pad([torch.tensor(each) for each in rows["ref"]], padding_value=0),
        "num_items_in_batch": mask.sum(),
    }


def labelled(row):
    """Return a pair in the columns of CPO and ORPO."""
    columns, start = {}, len(row["prompt_ids"])
    for side in ("chosen", "rejected"):
        ids = row["prompt_ids"] + row[f"{side}_ids"]
        columns[f"{side}_input_ids"], columns[f"{side}_attention_mask"] = ids, [1] * len(ids)
        columns[f"{side}_labels"] = [-100] * start + ids[start:]
    return columns


def sft_inputs(rows, pad_id):
    """Return the chosen responses in the columns of SFT."""
    rows = [labelled(row) for row in rows]
    fills = {"input_ids": pad_id, "attention_mask": 0, "labels": -100}
    return {
        name: pad([torch.tensor(row[f"chosen_{name}"]) for row in rows], padding_value=fill)
        for name, fill in fills.items()
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
