"""Run TRL's PPO on one enumerable world, in the environment with TRL: python trl_optimum.py WORLD.json POLICY_FOLDER

The end token of a world is also its pad token, from which TRL would not learn. So the network gets a separate pad token
that is never sampled, and that is removed before the policy is saved.
"""

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification
from trl.experimental.ppo import PPOConfig, PPOTrainer
from trl_settings import COMMON


class Policy(LlamaForCausalLM):
    """The network of the world, whose last token is never sampled."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits[..., -1] = -1e9
        return output


class Table(torch.nn.Module):
    """A reward model for TRL that looks scores up in a table. The score of a row is at each of its tokens."""

    base_model_prefix = "trunk"

    def __init__(self, scores, pad):
        super().__init__()
        self.table = {tuple(key): value for key, value in scores}
        self.pad = pad

    def trunk(self, input_ids, attention_mask, **_):
        rows = [
            tuple(token for token, real in zip(ids, mask, strict=True) if real)
            for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True)
        ]
        scores = torch.tensor([self.table[row] for row in rows])
        states = scores.view(-1, 1, 1).expand(-1, input_ids.shape[1], 1)
        return SimpleNamespace(hidden_states=[states])

    def score(self, states):
        return states


def with_pad(kind, folder, **options):
    """Return the network of the world with one more row in its embeddings."""
    model = kind.from_pretrained(folder, dtype=torch.float32, **options)
    model.resize_token_embeddings(model.config.vocab_size + 1, mean_resizing=False)
    model.config.pad_token_id = model.config.vocab_size - 1
    return model


def main(world_file, policy_folder):
    world = json.loads(Path(world_file).read_text())
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(world["policy"], padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    policy, reference = (with_pad(Policy, world["policy"]) for _ in range(2))
    value = with_pad(LlamaForSequenceClassification, world["policy"], num_labels=1)
    torch.nn.init.zeros_(value.score.weight)  # as keel's critic starts
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    prompts = Dataset.from_dict({"input_ids": world["prompts"] * world["batch_size"]})
    with tempfile.TemporaryDirectory() as output:
        args = PPOConfig(
            output_dir=output,
            per_device_train_batch_size=world["batch_size"],
            num_mini_batches=4,
            num_ppo_epochs=4,
            local_rollout_forward_batch_size=world["batch_size"],
            response_length=world["length"],
            total_episodes=world["steps"] * world["batch_size"],
            learning_rate=world["learning_rate"],
            lr_scheduler_type="linear",
            kl_coef=world["kl_coef"],
            seed=world["seed"],
            use_cpu=True,
            logging_steps=100,
            **COMMON,
        )
        PPOTrainer(
            args=args,
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=Table(world["scores"], tokenizer.pad_token_id),
            value_model=value,
            train_dataset=prompts,
            eval_dataset=prompts.select(range(1)),
        ).train()
    policy.resize_token_embeddings(policy.config.vocab_size - 1)
    policy.config.pad_token_id = policy.config.eos_token_id
    LlamaForCausalLM.save_pretrained(policy, policy_folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
