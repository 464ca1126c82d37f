"""Run TRL's PPO on the task of offsets.py, in the environment with TRL: python trl_offsets.py RUN.json RESULT.json"""

import json
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer
from trl_settings import COMMON

WORD = re.compile(r"[a-z']+")


class Valence(torch.nn.Module):
    """A reward model for TRL that returns offset + scale * valence of the response at each of its tokens."""

    base_model_prefix = "trunk"

    def __init__(self, tokenizer, prompts, run):
        super().__init__()
        rows = (line.split("\t") for line in Path(run["lexicon"]).read_text(encoding="utf-8").splitlines())
        self.valences = {row[0]: float(row[1]) for row in rows}
        self.tokenizer, self.prompts, self.run = tokenizer, {tuple(ids) for ids in prompts}, run
        self.lengths = sorted({len(ids) for ids in prompts})

    def score_of(self, ids):
        length = next(n for n in self.lengths if tuple(ids[:n]) in self.prompts)
        text = self.tokenizer.decode(ids[length:], skip_special_tokens=True)
        valence = sum(self.valences.get(word, 0.0) for word in WORD.findall(text.lower())) / 5
        return self.run["offset"] + self.run["scale"] * valence

    def trunk(self, input_ids, attention_mask, **_):
        rows = zip(input_ids.tolist(), attention_mask.tolist(), strict=True)
        scores = [self.score_of([token for token, real in zip(*row, strict=True) if real]) for row in rows]
        states = torch.tensor(scores).view(-1, 1, 1).expand(-1, input_ids.shape[1], 1)
        return SimpleNamespace(hidden_states=[states])

    def score(self, states):
        return states


def main(run_file, result_file):
    run = json.loads(Path(run_file).read_text())
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(run["policy"], padding_side="left")
    lines = Path(run["prompts"]).read_text().splitlines()
    prompts = [ids for ids in (tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines) if len(ids) <= 64]
    policy, reference = (AutoModelForCausalLM.from_pretrained(run["policy"]) for _ in range(2))
    value = AutoModelForSequenceClassification.from_pretrained(run["policy"], num_labels=1)
    steps = []
    with tempfile.TemporaryDirectory() as output:
        args = PPOConfig(
            output_dir=output,
            per_device_train_batch_size=64,
            num_mini_batches=4,
            num_ppo_epochs=4,
            local_rollout_forward_batch_size=64,
            response_length=32,
            total_episodes=run["steps"] * 64,
            learning_rate=3e-4,
            lr_scheduler_type="linear",
            kl_coef=0.05 * run["scale"],
            seed=run["seed"],
            use_cpu=True,
            logging_steps=1,
            **COMMON,
        )
        trainer = PPOTrainer(
            args=args,
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=Valence(tokenizer, prompts, run),
            value_model=value,
            train_dataset=Dataset.from_dict({"input_ids": prompts}),
            eval_dataset=Dataset.from_dict({"input_ids": prompts[:1]}),
        )
        log = trainer.log
        trainer.log = lambda metrics, *rest, **more: (steps.append(metrics), log(metrics, *rest, **more))
        trainer.train()
    found = [step for step in steps if "objective/scores" in step]
    score = [(step["objective/scores"] - run["offset"]) / run["scale"] for step in found]
    rows = [{"score": s, "objective/kl": step["objective/kl"]} for s, step in zip(score, found, strict=True)]
    Path(result_file).write_text(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
