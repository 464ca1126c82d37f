"""PPO for a language model in one flat file, with the exact answer beside it. Read this first.

    python examples/minimal_ppo.py            # about half a minute on one CPU core
    python examples/minimal_ppo.py --steps 40

Only `keel.core` and torch are used, so that every step of the method is visible; `keel train` does the same with
transformers, minibatches, many devices and records.

The task is small enough to list every answer. A prompt is one of three letters. The answer is up to four letters, ended
by the end token; it scores a point for each time it repeats the prompt's letter, loses half a point for each
other letter, and gets -1 if the limit cuts it off. The model is a GRU that starts from random weights: what it writes
then is the reference, and wandering from it costs kl_coef nats each. So the objective

    J(policy) = mean over prompts of  E[score] - kl_coef * KL(policy || reference)

can be computed, not estimated, and so can the best that any policy reaches: J* = mean of kl_coef * log Z(prompt),
Z = sum over answers of reference(answer) * exp(score / kl_coef).
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

LETTERS, END, LIMIT = 3, 3, 4  # letters 0, 1, 2; the end token 3; at most four tokens in an answer
VOCABULARY = LETTERS + 1

# the settings of the method
kl_coef = 0.3
gamma, gae_lambda = 1.0, 0.95
clip_range = 0.2
batch_size, update_epochs, minibatch_size = 192, 4, 48
learning_rate = 3e-3


class Network(nn.Module):
    """Reads prompt and answer so far; says something about what comes next. Policy and critic are one each."""

    def __init__(self, outputs: int, width: int = 48) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.recurrence = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, L] -> [B, L, outputs]; place t has seen tokens 0..t."""
        hidden, _ = self.recurrence(self.embedding(tokens))
        return self.head(hidden)


def response_logprobs(model: Network, prompts: Tensor, responses: Tensor) -> Tensor:
    """log pi(y_t | x, y_<t) of every response token. [B], [B, T] -> [B, T]"""
    seen = torch.cat([prompts.unsqueeze(1), responses[:, :-1]], dim=1)
    return token_logprobs(model(seen), responses)


def response_values(critic: Network, prompts: Tensor, responses: Tensor) -> Tensor:
    """V(s_t): what the critic expects before it sees token t. [B], [B, T] -> [B, T]"""
    seen = torch.cat([prompts.unsqueeze(1), responses[:, :-1]], dim=1)
    return critic(seen).squeeze(-1)


@torch.no_grad()
def sample(model: Network, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Answers [B, T] and their mask: True for every token that was sampled, the end token included."""
    tokens, masks = [prompts], []
    going = torch.ones_like(prompts, dtype=torch.bool)
    for _ in range(LIMIT):
        logits = model(torch.stack(tokens, dim=1))[:, -1]
        tokens.append(torch.multinomial(logits.softmax(-1), 1).squeeze(1))
        masks.append(going)
        going = going & (tokens[-1] != END)
    return torch.stack(tokens[1:], dim=1), torch.stack(masks, dim=1)


def score(prompts: Tensor, responses: Tensor, mask: Tensor) -> Tensor:
    """The judge: one number for each answer. In earnest this is a reward model, learned from human rankings. [B]"""
    letters = mask & (responses != END)
    hits = masked_sum((responses == prompts.unsqueeze(1)).float(), letters, dim=1)
    ended = (mask & (responses == END)).any(1)
    return torch.where(ended, 1.5 * hits - 0.5 * letters.sum(1), -1.0)


def every_answer() -> tuple[Tensor, Tensor, Tensor]:
    """All prompts with all answers: prompts [N], responses [N, T], mask [N, T]."""
    answers = [
        (*letters, END) for length in range(LIMIT) for letters in itertools.product(range(LETTERS), repeat=length)
    ]
    answers += list(itertools.product(range(LETTERS), repeat=LIMIT))
    rows = [(prompt, answer) for prompt in range(LETTERS) for answer in answers]
    responses = torch.tensor([[*answer, *[END] * (LIMIT - len(answer))] for _, answer in rows])
    mask = torch.tensor([[t < len(answer) for t in range(LIMIT)] for _, answer in rows])
    return torch.tensor([prompt for prompt, _ in rows]), responses, mask


@torch.no_grad()
def exact(model: Network, reference: Network) -> dict[str, float]:
    """J of the model and of the best possible policy, by adding up every answer."""
    prompts, responses, mask = every_answer()
    scores = score(prompts, responses, mask)
    log_pi, log_ref = (masked_sum(response_logprobs(m, prompts, responses), mask, dim=1) for m in (model, reference))
    pi = log_pi.exp() / LETTERS  # prompts are equally likely
    mean_score, kl = (pi * scores).sum().item(), (pi * (log_pi - log_ref)).sum().item()
    log_z = (log_ref + scores / kl_coef).view(LETTERS, -1).logsumexp(1)
    return {"score": mean_score, "kl": kl, "J": mean_score - kl_coef * kl, "J*": (kl_coef * log_z).mean().item()}


def main(steps: int = 150, seed: int = 0) -> dict[str, float]:
    torch.manual_seed(seed)
    policy, critic = Network(VOCABULARY), Network(1)
    reference = copy.deepcopy(policy).requires_grad_(False)  # frozen: exactly the weights that the run starts from
    nn.init.zeros_(critic.head.weight)
    nn.init.zeros_(critic.head.bias)
    optimizer = torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    start = exact(policy, reference)

    for step in range(1, steps + 1):
        # 1. prompts; 2. the policy answers; 3. the judge scores
        prompts = torch.randint(LETTERS, (batch_size,))
        responses, mask = sample(policy, prompts)
        scores = score(prompts, responses, mask)

        with torch.no_grad():
            # 4. rewards of tokens: minus the KL to the reference, and the score on the last token
            logprobs = response_logprobs(policy, prompts, responses)
            ref_logprobs = response_logprobs(reference, prompts, responses)
            kl = kl_estimate(logprobs, ref_logprobs, "k1")
            rewards = token_rewards(place_scores(scores, mask), kl, mask, kl_coef)
            # 5. the critic turns them into advantages and returns
            values = response_values(critic, prompts, responses)
            advantages, returns = gae(rewards, values, mask, gamma, gae_lambda)
            advantages = whiten(advantages, mask)

        # 6. the update: several epochs over the same answers, as far as the clipped ratio lets them go
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
