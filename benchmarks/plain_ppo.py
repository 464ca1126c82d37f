"""Measure PPO in plain transformers, without keel or TRL: python plain_ppo.py TASK.json RESULT.json"""

import json
import sys
from pathlib import Path
from random import Random

import torch
from memory import peak_mb
from step_meter import StepMeter
from torch.nn.functional import cross_entropy, mse_loss
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


def main(task_file, result_file):
    task = json.loads(Path(task_file).read_text())
    torch.set_num_threads(task["threads"])
    torch.manual_seed(task["seed"])
    idle, tokenizer = peak_mb(), AutoTokenizer.from_pretrained(task["policy"], padding_side="left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(task["policy"]) for _ in range(2))
    critic, reward = (
        AutoModelForSequenceClassification.from_pretrained(task[name], num_labels=1) for name in ("policy", "reward")
    )
    for model in (policy, reference, critic, reward):
        model.eval()
    parameters = [*policy.parameters(), *critic.parameters()]
    optimizer = torch.optim.AdamW(parameters, task["learning_rate"], weight_decay=0.0)
    prompts = [json.loads(line)["prompt"] for line in Path(task["prompts"]).read_text().splitlines()]
    Random(task["seed"]).shuffle(prompts)
    meter, size = StepMeter(policy.config.get_text_config().vocab_size), task["batch_size"]
    end = {"min_new_tokens": task["max_response_tokens"]} if task["full_length"] else {}

    def logprobs(model, tokens, mask, width):
        logits = model(tokens, attention_mask=mask, logits_to_keep=width + 1).logits[:, :-1]
        return -cross_entropy(logits.transpose(1, 2), tokens[:, -width:], reduction="none")

    def values(model, tokens, mask, width):
        return model.score(model.model(tokens, attention_mask=mask).last_hidden_state[:, -width - 1 :]).squeeze(-1)

    for step in range(task["steps"]):
        meter.phase("sample")
        rows = [prompts[(step * size + i) % len(prompts)] for i in range(size)]
        inputs = tokenizer(rows, return_tensors="pt", padding=True)
        tokens = policy.generate(
            **inputs, max_new_tokens=task["max_response_tokens"], do_sample=True, top_k=0, top_p=1.0, **end
        )
        meter.phase("score and targets")
        width = tokens.shape[1] - inputs["input_ids"].shape[1]
        is_end = tokens[:, -width:] == tokenizer.eos_token_id
        counted = (is_end.int().cumsum(1) - is_end.int() == 0).int()
        mask = torch.cat([inputs["attention_mask"], counted], 1)
        with torch.no_grad():
            old, initial = (logprobs(model, tokens, mask, width) for model in (policy, reference))
            baselines = values(critic, tokens, mask, width)[:, :-1] * counted
            rewards = -task["kl_coef"] * (old - initial) * counted
            last = counted.sum(1) - 1
            rewards[torch.arange(size), last] += values(reward, tokens, mask, width)[torch.arange(size), last + 1]
            advantages, running = torch.zeros_like(rewards), torch.zeros(size)
            for t in reversed(range(width)):
                following = baselines[:, t + 1] if t + 1 < width else 0.0
                running = rewards[:, t] + following - baselines[:, t] + 0.95 * running
                advantages[:, t] = running
            returns, kept = advantages + baselines, counted.bool()
            advantages = (advantages - advantages[kept].mean()) / advantages[kept].std()
        meter.phase("update")
        for _ in range(task["update_epochs"]):
            for some in torch.randperm(size).tensor_split(task["minibatches"]):
                kept = counted[some].bool()
                ratio = (logprobs(policy, tokens[some], mask[some], width) - old[some]).exp()[kept]
                advantage = advantages[some][kept]
                loss = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
                loss.backward()
                value = values(critic, tokens[some], mask[some], width)[:, :-1]
                (0.1 * mse_loss(value[kept], returns[some][kept])).backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
        meter.end_step()
    result = {"peak_mb": peak_mb(), "idle_mb": idle, **meter.result()}
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
