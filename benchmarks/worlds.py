"""Worlds: tasks small enough to enumerate, in which the probability of every response and the objective are exact.

A world is a Hugging Face model folder, a few prompts, and a score for every response. With log pi(y|x) of all of them,
    J(pi) = mean over prompts of E_pi[r] - kl_coef KL(pi || pi_ref),
    pi*(y|x) = pi_ref(y|x) exp(r(x, y) / kl_coef) / Z(x),    J* = mean over prompts of kl_coef log Z(x),
are sums. Letters: N prompts, A responses to a prompt, V vocabulary, L longest response.
"""

import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

END = 0  # the end token, which is the pad token too: padding must be known by the mask alone
WORDS = ("<end>", "a", "b", "c", "d", "e", "f", "g")

# T3: the log-odds of the next word after the word before (None: at the start), for the words <end>, a, b
T3_LOGITS = {None: (-1.0, 1.0, 0.0), 1: (0.5, 0.0, 0.5), 2: (0.0, 0.5, 0.0)}


@dataclass(frozen=True)
class World:
    """An enumerable task: the initial model, its prompts, and the score of every response."""

    name: str
    folder: Path  # policy/ (weights, tokenizer) and prompts.jsonl
    prompts: tuple[tuple[int, ...], ...]  # N prompts as token ids
    scores: Tensor  # [N, A] float64, answers in the order of `answers`
    vocabulary: int
    length: int
    kl_coef: float

    def text(self, prompt: Sequence[int]) -> str:
        return " ".join(WORDS[token] for token in prompt)

    def scorer(self) -> Callable[..., list[float]]:
        """Return scores from the table. The signature is that of a reward function."""
        row = {self.text(prompt): i for i, prompt in enumerate(self.prompts)}
        column = {answer: i for i, answer in enumerate(answers(self.vocabulary, self.length))}
        table = self.scores.tolist()

        def score(prompts: list[str], completion_ids: list[list[int]], **_: object) -> list[float]:
            return [table[row[p]][column[tuple(ids)]] for p, ids in zip(prompts, completion_ids, strict=True)]

        return score


@dataclass(frozen=True)
class Exact:
    """Exact metrics of a policy, as means over the prompts."""

    objective: float  # J
    optimum: float  # J*
    start: float  # J of the reference = its mean score
    score: float  # E[r]
    kl: float  # KL(pi || pi_ref)
    total_variation: float  # between pi and pi*

    @property
    def regret(self) -> float:
        """Return (J* - J) / (J* - J_ref): 1 for the initial model, 0 at the optimum."""
        return (self.optimum - self.objective) / (self.optimum - self.start)


def answers(vocabulary: int, length: int) -> list[tuple[int, ...]]:
    """Return every response: those that end after 0, 1, ... words, then those cut at `length` words."""
    words = range(1, vocabulary)
    ended = [(*prefix, END) for k in range(length) for prefix in itertools.product(words, repeat=k)]
    return ended + list(itertools.product(words, repeat=length))


def answer_logprobs(model: PreTrainedModel, prompts: Sequence[Sequence[int]], length: int) -> Tensor:
    """Return log pi(y|x) of every response [N, A], over the full vocabulary and in the order of `answers`.

    A forward pass over all sequences one word shorter than the longest response gives the logits after every prefix.
    Prompts of equal length share a pass, so nothing is padded.
    """
    words = range(1, model.config.vocab_size)
    paths = torch.tensor(list(itertools.product(words, repeat=length - 1))).reshape(-1, length - 1)
    rows: dict[int, Tensor] = {}
    for size in sorted({len(prompt) for prompt in prompts}):
        members = [i for i, prompt in enumerate(prompts) if len(prompt) == size]
        heads = torch.tensor([prompts[i] for i in members]).repeat_interleave(len(paths), 0)
        logits = model(torch.cat([heads, paths.repeat(len(members), 1)], 1), use_cache=False).logits[:, size - 1 :]
        steps = logits.double().log_softmax(-1)  # [members * paths, L, V]
        rows |= zip(members, _sum_over_paths(steps.unflatten(0, (len(members), -1))), strict=True)
    return torch.stack([rows[i] for i in range(len(prompts))])


def _sum_over_paths(steps: Tensor) -> Tensor:
    """Sum next-token log-probabilities along every path: [N, paths, L, V] -> log pi of every response [N, A]."""
    num_words, length = steps.shape[-1] - 1, steps.shape[2]
    prefix = steps.new_zeros(steps.shape[0], 1)
    ended = []
    for k in range(length):
        first = steps[:, :: num_words ** (length - 1 - k), k]  # one path through each prefix of k words
        ended.append(prefix + first[..., END])
        prefix = (prefix[..., None] + first[..., 1:]).flatten(1)
    return torch.cat([*ended, prefix], 1)


def objective(logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, kl_coef: float) -> Tensor:
    """Return J, differentiable. All arguments are [N, A]."""
    return (logprobs.exp() * (scores - kl_coef * (logprobs - ref_logprobs))).sum(1).mean()


def exact(logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, kl_coef: float) -> Exact:
    """Return every metric of a policy from the log-probabilities of all responses. All arguments are [N, A]."""
    tilted = ref_logprobs + scores / kl_coef
    log_z = tilted.logsumexp(1, keepdim=True)
    probs, best = logprobs.exp(), (tilted - log_z).exp()
    return Exact(
        objective=float(objective(logprobs, ref_logprobs, scores, kl_coef)),
        optimum=float(kl_coef * log_z.mean()),
        start=float((ref_logprobs.exp() * scores).sum(1).mean()),
        score=float((probs * scores).sum(1).mean()),
        kl=float((probs * (logprobs - ref_logprobs)).sum(1).mean()),
        total_variation=float(0.5 * (probs - best).abs().sum(1).mean()),
    )


def load(folder: Path) -> PreTrainedModel:
    """Load the model of a folder in float64, without dropout."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@torch.no_grad()
def measure(world: World, folder: Path) -> Exact:
    """Return the exact metrics of the policy saved in `folder`."""
    logprobs = answer_logprobs(load(folder), world.prompts, world.length)
    ref_logprobs = answer_logprobs(load(world.folder / "policy"), world.prompts, world.length)
    return exact(logprobs, ref_logprobs, world.scores, world.kl_coef)


def random_world(folder: Path, seed: int) -> World:
    """Make a world with a small random Llama, random prompts, and N(0, 1) scores for every response, cut ones too."""
    rng = random.Random(seed)
    vocabulary, hidden = rng.randint(4, 8), rng.choice((32, 48, 64))
    length = rng.randint(3, 4) if vocabulary <= 6 else 3  # at most 781 answers to a prompt
    kl_coef = round(0.2 * 5 ** rng.random(), 3)  # log-uniform in 0.2 .. 1
    # no word twice: without a begin token, "a", "a a" and "a a a" are one and the same state to a rotary model
    choices = [prompt for size in (2, 3) for prompt in itertools.permutations(range(1, vocabulary), size)]
    prompts = tuple(rng.sample(choices, 4))
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=1.2 * hidden**-0.5,  # logits spread by about 1.2: a reference far from uniform
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=END,
        tie_word_embeddings=False,
    )
    scores = torch.randn(len(prompts), len(answers(vocabulary, length)), dtype=torch.float64)
    world = World(f"random-{seed}", folder, prompts, scores, vocabulary, length, kl_coef)
    _save(world, LlamaForCausalLM(config))
    return world


def t3_world(folder: Path, seed: int = 0) -> World:
    """Make the three-letter world T3 as a GPT-2 that is fitted to a table of next-word log-odds. It is the reference.

    Learned positions distinguish the prompt from a response of the same word.
    """
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=3,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=END,
    )
    table = answers(3, 3)
    scores = [[float(answer.count(1)) if answer[-1] == END else -1.0 for answer in table]]
    world = World("T3", folder, ((1,),), torch.tensor(scores, dtype=torch.float64), 3, 3, 0.5)
    model = GPT2LMHeadModel(config).double()
    fit(model, world, t3_logprobs())
    _save(world, model.float())
    return world


def t3_logprobs() -> Tensor:
    """Return log pi_ref of the fifteen responses of T3 [1, 15]."""
    rows = {before: torch.tensor(odds, dtype=torch.float64).log_softmax(0) for before, odds in T3_LOGITS.items()}
    logprobs = [
        sum(rows[before][token] for before, token in zip((None, *answer), answer, strict=False))
        for answer in answers(3, 3)
    ]
    return torch.stack([torch.as_tensor(value) for value in logprobs])[None]


def fit(model: PreTrainedModel, world: World, target: Tensor) -> None:
    """Fit the model until KL(target || model) over the enumerated responses is at rounding error."""
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (target.exp() * (target - answer_logprobs(model, world.prompts, world.length))).sum(1).mean()
        loss.backward()
        return loss

    optimizer.step(closure)


def _save(world: World, model: PreTrainedModel) -> None:
    vocabulary = {word: i for i, word in enumerate(WORDS[: world.vocabulary])}
    core = Tokenizer(models.WordLevel(vocabulary))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=WORDS[END], pad_token=WORDS[END])
    tokenizer.save_pretrained(world.folder / "policy")
    model.save_pretrained(world.folder / "policy")
    lines = [json.dumps({"prompt": world.text(prompt)}) for prompt in world.prompts]
    (world.folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
