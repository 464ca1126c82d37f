"""PPO for a language model in one file, on a task whose exact optimum is known. Read this first.

    python examples/minimal_ppo.py            # about half a minute on one CPU core
    python examples/minimal_ppo.py --steps 40

It uses only `keel.core` and torch, so that every step of the method is visible. `keel train` does the same with
transformers, several devices, checkpoints and logs.

The task is small enough to list every response. A prompt is one of three letters. A response is up to four letters and
the end token. It scores a point for each letter that equals the prompt, loses half a point for each other letter, and
scores -1 if the length limit cuts it. The model is a GRU with random weights. Its initial state is the reference, and
each nat of KL to it costs kl_coef. So the objective

    J(policy) = mean over prompts of  E[score] - kl_coef * KL(policy || reference)

can be computed exactly, and so can its maximum over all policies: J* = mean of kl_coef * log Z(prompt), where
Z = sum over responses of reference(response) * exp(score / kl_coef).
"""

import argparse
import copy
import itertools

import torch
from torch import Tensor, nn

from keel.core.advantages import gae
from keel.core.diagnostics import approx_kl, clipfrac, explained_variance
from keel.core.kl import kl_estimate
from keel.core.logprobs import token_logprobs
from keel.core.losses import clipped_policy_loss, value_loss
from keel.core.masked import masked_mean, masked_sum, whiten
from keel.core.rewards import place_scores, token_rewards

LETTERS, END, LIMIT = 3, 3, 4  # letters 0, 1, 2; the end token 3; at most four tokens in a response
VOCABULARY = LETTERS + 1

# Settings of the method, with the names of keel's settings.
kl_coef = 0.3
gamma, gae_lambda = 1.0, 0.95
clip_range = 0.2
batch_size, update_epochs, minibatch_size = 192, 4, 48
learning_rate = 3e-3


class Network(nn.Module):
    """A GRU over prompt and response. The policy has an output for each token, the critic has one output."""

    def __init__(self, outputs: int, width: int = 48) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.recurrence = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return outputs [B, L, outputs] for tokens [B, L]. Position t has read the tokens 0..t."""
        hidden, _ = self.recurrence(self.embedding(tokens))
        return self.head(hidden)


def response_logprobs(model: Network, prompts: Tensor, responses: Tensor) -> Tensor:
    """Return log pi(y_t | x, y_<t) of every response token. [B], [B, T] -> [B, T]"""
    inputs = torch.cat([prompts.unsqueeze(1), responses[:, :-1]], dim=1)
    return token_logprobs(model(inputs), responses)


def response_values(critic: Network, prompts: Tensor, responses: Tensor) -> Tensor:
    """Return V(s_t), the return that the critic expects before token t. [B], [B, T] -> [B, T]"""
    inputs = torch.cat([prompts.unsqueeze(1), responses[:, :-1]], dim=1)
    return critic(inputs).squeeze(-1)


@torch.no_grad()
def sample(model: Network, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Sample responses [B, T], and return them with their mask: True for sampled tokens, including the end token."""
    tokens, masks = [prompts], []
    active = torch.ones_like(prompts, dtype=torch.bool)
    for _ in range(LIMIT):
        logits = model(torch.stack(tokens, dim=1))[:, -1]
        tokens.append(torch.multinomial(logits.softmax(-1), 1).squeeze(1))
        masks.append(active)
        active = active & (tokens[-1] != END)
    return torch.stack(tokens[1:], dim=1), torch.stack(masks, dim=1)


def score(prompts: Tensor, responses: Tensor, mask: Tensor) -> Tensor:
    """Return a score for each response [B]. In practice this is a reward model trained on human rankings."""
    letters = mask & (responses != END)
    hits = masked_sum((responses == prompts.unsqueeze(1)).float(), letters, dim=1)
    ended = (mask & (responses == END)).any(1)
    return torch.where(ended, 1.5 * hits - 0.5 * letters.sum(1), -1.0)


def every_response() -> tuple[Tensor, Tensor, Tensor]:
    """Return all prompts with all responses: prompts [N], responses [N, T], mask [N, T]."""
    texts = [(*letters, END) for length in range(LIMIT) for letters in itertools.product(range(LETTERS), repeat=length)]
    texts += list(itertools.product(range(LETTERS), repeat=LIMIT))
    rows = [(prompt, text) for prompt in range(LETTERS) for text in texts]
    responses = torch.tensor([[*text, *[END] * (LIMIT - len(text))] for _, text in rows])
    mask = torch.tensor([[t < len(text) for t in range(LIMIT)] for _, text in rows])
    return torch.tensor([prompt for prompt, _ in rows]), responses, mask


@torch.no_grad()
def exact(model: Network, reference: Network) -> dict[str, float]:
    """Return J of the model and of the best possible policy, as sums over every response."""
    prompts, responses, mask = every_response()
    scores = score(prompts, responses, mask)
    log_pi, log_ref = (masked_sum(response_logprobs(m, prompts, responses), mask, dim=1) for m in (model, reference))
    pi = log_pi.exp() / LETTERS  # prompts are equally likely
    mean_score, kl = (pi * scores).sum().item(), (pi * (log_pi - log_ref)).sum().item()
    log_z = (log_ref + scores / kl_coef).view(LETTERS, -1).logsumexp(1)
    return {"score": mean_score, "kl": kl, "J": mean_score - kl_coef * kl, "J*": (kl_coef * log_z).mean().item()}


def main(steps: int = 150, seed: int = 0) -> dict[str, float]:
    torch.manual_seed(seed)
    policy, critic = Network(VOCABULARY), Network(1)
    reference = copy.deepcopy(policy).requires_grad_(False)  # frozen copy of the initial weights
    nn.init.zeros_(critic.head.weight)
    nn.init.zeros_(critic.head.bias)
    optimizer = torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    start = exact(policy, reference)

    for step in range(1, steps + 1):
        # 1. draw prompts; 2. sample responses; 3. score them
        prompts = torch.randint(LETTERS, (batch_size,))
        responses, mask = sample(policy, prompts)
        scores = score(prompts, responses, mask)

        with torch.no_grad():
            # 4. rewards of tokens: minus the KL to the reference, plus the score on the last token
            logprobs = response_logprobs(policy, prompts, responses)
            ref_logprobs = response_logprobs(reference, prompts, responses)
            kl = kl_estimate(logprobs, ref_logprobs, "k1")
            rewards = token_rewards(place_scores(scores, mask), kl, mask, kl_coef)
            # 5. advantages and returns, with the values of the critic
            values = response_values(critic, prompts, responses)
            advantages, returns = gae(rewards, values, mask, gamma, gae_lambda)
            advantages = whiten(advantages, mask)

        # 6. update: several epochs over the same responses; the clipped ratio limits how far they move the policy
        for _ in range(update_epochs):
            for rows in torch.randperm(batch_size).split(minibatch_size):
                x, y, counted = prompts[rows], responses[rows], mask[rows]
                new_logprobs, new_values = response_logprobs(policy, x, y), response_values(critic, x, y)
                policy_loss = clipped_policy_loss(
                    new_logprobs, logprobs[rows], advantages[rows], clip_range, clip_range
                )
                critic_loss = value_loss(new_values, values[rows], returns[rows])
                optimizer.zero_grad()
                masked_mean(policy_loss + critic_loss, counted).backward()
                nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
                nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
                optimizer.step()
        schedule.step()

        if step == 1 or step % 25 == 0 or step == steps:
            now = exact(policy, reference)
            drift = masked_mean(approx_kl(new_logprobs.detach(), logprobs[rows]), counted)
            clipped = masked_mean(
                clipfrac(new_logprobs, logprobs[rows], advantages[rows], clip_range, clip_range), counted
            )
            print(
                f"step {step:4d}   J {now['J']:7.4f} of {now['J*']:.4f}   score {now['score']:6.3f}"
                f"   KL {now['kl']:6.3f}   explained variance {explained_variance(values, returns, mask).item():6.3f}"
                f"   approx KL {drift.item():.4f}   clipped {clipped.item():.2f}"
            )

    end = exact(policy, reference)
    share = (end["J"] - start["J"]) / (end["J*"] - start["J"])
    print(f"\nJ at the start {start['J']:.4f}, reached {end['J']:.4f}: {share:.1%} of the way")
    print(f"exact optimum J* {end['J*']:.4f}")
    return {**end, "start": start["J"], "share": share}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="PPO on a task whose exact optimum is known")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
