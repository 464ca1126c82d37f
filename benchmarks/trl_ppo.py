"""Run TRL's PPO on one task, in the environment with TRL: python trl_ppo.py TASK.json RESULT.json [POLICY_FOLDER]"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from memory import peak_mb
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
from trl_settings import COMMON


class Clock:
    """Measure seconds per phase and step, where TRL's loop changes from one phase to the next."""

    def __init__(self):
        self.steps, self.last, self.tokens = [], None, 0

    def watch(self, trainer):
        generate, forward, log = ppo_trainer.batch_generation, ppo_trainer.forward, trainer.log
        pad = trainer.processing_class.pad_token_id
        end = trainer.stop_token_id

        def timed_generation(model, queries, *args):
            self.start = time.perf_counter()
            answers = generate(model, queries, *args)
            self.sampled, self.updating = time.perf_counter(), None
            responses = answers[0][:, queries.shape[1] :]
            ended = (responses == end).int().cumsum(1)
            self.tokens = int(((ended == 0) & (responses != pad)).sum() + (ended.max(1).values > 0).sum())
            return answers

        def timed_forward(*args):
            if torch.is_grad_enabled() and self.updating is None:
                self.updating = time.perf_counter()
            return forward(*args)

        def timed_log(metrics, *args, **kwargs):
            if "objective/kl" in metrics:
                end = time.perf_counter()
                self.steps.append(
                    {
                        "sample": self.sampled - self.start,
                        "score and targets": self.updating - self.sampled,
                        "update": end - self.updating,
                        "step": end - self.start,
                        "tokens": self.tokens,
                        "score": metrics["objective/scores"],
                        "kl": metrics["objective/kl"],
                    }
                )
            return log(metrics, *args, **kwargs)

        ppo_trainer.batch_generation, ppo_trainer.forward, trainer.log = timed_generation, timed_forward, timed_log


def main(task_file, result_file, policy_folder=None):
    task = json.loads(Path(task_file).read_text())
    torch.set_num_threads(task["threads"])
    idle = peak_mb()
    with tempfile.TemporaryDirectory() as output:
        trainer = build_trainer(task, output)
        clock = Clock()
        clock.watch(trainer)
        trainer.train()
        if policy_folder:
            trainer.policy_model.save_pretrained(policy_folder)
            trainer.processing_class.save_pretrained(policy_folder)
    result = {"steps": clock.steps, "peak_mb": peak_mb(), "idle_mb": idle}
    Path(result_file).write_text(json.dumps(result))


def build_trainer(task, output):
    tokenizer = AutoTokenizer.from_pretrained(task["policy"], padding_side="left")
    prompts = [json.loads(line)["prompt"] for line in Path(task["prompts"]).read_text().splitlines()]
    dataset = Dataset.from_dict({"input_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts]})
    policy, reference = (AutoModelForCausalLM.from_pretrained(task["policy"]) for _ in range(2))
    reward = AutoModelForSequenceClassification.from_pretrained(task["reward"], num_labels=1)
    value = AutoModelForSequenceClassification.from_pretrained(task["policy"], num_labels=1)
    args = PPOConfig(
        output_dir=output,
        per_device_train_batch_size=task["batch_size"],  # in one piece: its minibatches are split from it
        num_mini_batches=task["minibatches"],
        num_ppo_epochs=task["update_epochs"],
        local_rollout_forward_batch_size=task["batch_size"],
        response_length=task["max_response_tokens"],
        total_episodes=task["steps"] * task["batch_size"],
        learning_rate=task["learning_rate"],
        lr_scheduler_type="constant",
        kl_coef=task["kl_coef"],
        seed=task["seed"],
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        **COMMON,
    )
    return PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=dataset,
        eval_dataset=dataset,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
