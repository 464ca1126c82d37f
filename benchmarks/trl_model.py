"""Measure TRL on one task with a real model, in an environment with TRL: python trl_model.py TASK.json RESULT.json"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from memory import peak_mb
from step_meter import StepMeter
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback


def main(task_file, result_file):
    task = json.loads(Path(task_file).read_text())
    torch.set_num_threads(task["threads"])
    idle, meter = peak_mb(), StepMeter(AutoConfig.from_pretrained(task["policy"]).get_text_config().vocab_size)
    with tempfile.TemporaryDirectory() as output:
        trainer = {"ppo": ppo, "grpo": from_rewards, "rloo": from_rewards}.get(task["algorithm"], from_pairs)(
            task, output, meter
        )
        trainer.train()
    Path(result_file).write_text(json.dumps({"peak_mb": peak_mb(), "idle_mb": idle, **meter.result()}))


def ppo(task, output, meter):
    """Build the trainer, and mark its phases where its loop changes from one to the next."""
    from trl.experimental.ppo import ppo_trainer
    from trl_ppo import build_trainer

    trainer = build_trainer(task, output)
    generate, forward, log = ppo_trainer.batch_generation, ppo_trainer.forward, trainer.log

    def measured_generation(*args):
        meter.phase("sample")
        if task["full_length"]:
            args[-1].suppress_tokens = never_sampled(trainer.processing_class)
        generated = generate(*args)
        meter.phase("score and targets")
        return generated

    def measured_forward(*args):
        if torch.is_grad_enabled() and meter.name == "score and targets":
            meter.phase("update")
        return forward(*args)

    def measured_log(metrics, *args, **kwargs):
        if "objective/kl" in metrics:
            meter.end_step()
        return log(metrics, *args, **kwargs)

    ppo_trainer.batch_generation, ppo_trainer.forward, trainer.log = measured_generation, measured_forward, measured_log
    return trainer


def from_rewards(task, output, meter):
    """Build the trainer of grpo or rloo. One step is one generation and the optimizer steps that learn from it."""
    import trl
    from rewards import share_of_letters

    tokenizer = AutoTokenizer.from_pretrained(task["policy"])
    name, minibatches = task["algorithm"].upper(), task["minibatches"]
    args = getattr(trl, f"{name}Config")(
        per_device_train_batch_size=task["batch_size"] // minibatches,
        steps_per_generation=minibatches,
        num_iterations=task["update_epochs"],
        max_steps=task["steps"] * task["update_epochs"] * minibatches,
        num_generations=task["group_size"],
        max_completion_length=task["max_response_tokens"],
        beta=task["kl_coef"],
        generation_kwargs={"suppress_tokens": never_sampled(tokenizer)} if task["full_length"] else None,
        **common(task, output),
    )
    prompts = [json.loads(line)["prompt"] for line in Path(task["prompts"]).read_text().splitlines()]
    trainer = getattr(trl, f"{name}Trainer")(
        model=task["policy"],
        reward_funcs=share_of_letters,
        args=args,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
    )
    respond = trainer._generate_and_score_completions

    def measured_responses(inputs):
        if meter.name:
            meter.end_step()
        meter.phase("sample")
        responses = respond(inputs)
        meter.phase("update")
        return responses

    trainer._generate_and_score_completions = measured_responses
    trainer.add_callback(Steps(begin=lambda: None, end=lambda: None, finish=meter.end_step))
    return trainer


def from_pairs(task, output, meter):
    """Build the trainer of dpo, reward or sft. The reference of dpo reads the pairs before the first step."""
    import trl

    name = {"dpo": "DPO", "reward": "Reward", "sft": "SFT"}[task["algorithm"]]
    args = getattr(trl, f"{name}Config")(
        per_device_train_batch_size=task["batch_size"],
        max_steps=task["steps"],
        max_length=512,
        **({"precompute_ref_log_probs": True} if name == "DPO" else {}),
        **({"center_rewards_coefficient": 0.01} if name == "Reward" else {}),
        **common(task, output),
    )
    rows = [json.loads(line) for line in Path(task["prompts"]).read_text().splitlines()]
    model = task["policy"]
    if name == "Reward":
        model = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    trainer = getattr(trl, f"{name}Trainer")(
        model=model,
        args=args,
        processing_class=AutoTokenizer.from_pretrained(task["policy"]),
        train_dataset=Dataset.from_list(rows),
    )
    trainer.add_callback(Steps(begin=lambda: meter.phase("update"), end=meter.end_step, finish=lambda: None))
    return trainer


class Steps(TrainerCallback):
    def __init__(self, begin, end, finish):
        self.begin, self.end, self.finish = begin, end, finish

    def on_step_begin(self, *_, **__):
        self.begin()

    def on_step_end(self, *_, **__):
        self.end()

    def on_train_end(self, *_, **__):
        self.finish()


def common(task, output):
    """Return settings of every trainer: one process, float32, a constant rate, no saving, reporting or recomputing."""
    return {
        "output_dir": output,
        "learning_rate": task["learning_rate"],
        "lr_scheduler_type": "constant",
        "seed": task["seed"],
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
    }


def never_sampled(tokenizer):
    """Return the end token and the padding, which TRL does not count as a token."""
    return sorted({tokenizer.eos_token_id, tokenizer.pad_token_id} - {None})


if __name__ == "__main__":
    main(*sys.argv[1:])
