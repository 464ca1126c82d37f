"""The whole loop on the embedded world: what `keel quickstart` does, stage after stage, files between them.

Nobody but the simulated raters and the judge at the end knows the gold score.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from keel.config import (
    EvaluateConfig,
    QuickstartConfig,
    RankConfig,
    RewardConfig,
    SampleConfig,
    SftConfig,
    TrainConfig,
    parse,
)
from keel.diagnosis.doctor import diagnose
from keel.diagnosis.findings import Diagnosis
from keel.errors import ConfigError
from keel.evaluation.evaluate import evaluate_policies
from keel.evaluation.sample import sample_responses
from keel.quickstart import corpus
from keel.quickstart.gold import gold_score
from keel.quickstart.ranking import rank_responses
from keel.quickstart.report import draw_curves, print_responses, print_table
from keel.quickstart.tokenizer import build_tokenizer, tiny_llama
from keel.run.folder import write_atomic
from keel.run.read.run import read_run
from keel.supervised.reward import reward
from keel.supervised.sft import sft
from keel.training.policy import train_policy
from keel.web.rank.serve import check_rank_settings

MAX_RESPONSE_TOKENS = 40
RESPONSES_PER_PROMPT = 4
NUM_TEXTS, NUM_DIALOGUES, NUM_RATED, NUM_PROMPTS, NUM_HELD_OUT = 14_000, 2_400, 1_200, 1_500, 150
NUM_TODAY = 300  # prompts that come in once the policy is in use, for `keel drift`


@dataclass
class Quickstart:
    """Paths and clock of one quickstart."""

    config: QuickstartConfig
    started: float = field(default_factory=time.monotonic)

    @property
    def root(self) -> Path:
        return Path(self.config.output)

    def path(self, name: str) -> str:
        return str(self.root / name)

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[str], None]]:
        """One line when the stage is done: its name, what came of it, and its seconds."""
        start, outcome = time.monotonic(), [""]
        yield lambda text: outcome.append(text)
        print(f"{name:<14}{outcome[-1]:<78}{time.monotonic() - start:6.1f} s", flush=True)


def quickstart(config: QuickstartConfig) -> dict[str, Any]:
    """Corpus to judged policy; everything lies in `config.output`. Returns what `summary.json` holds."""
    run = Quickstart(config)
    if (run.root / "data").exists():
        raise ConfigError(
            "holds a quickstart already", where=config.output, fix="choose another --output, or delete it"
        )
    if config.human:
        check_rank_settings(parse(RankConfig, {}))
    with one_thread():
        reward_figures = up_to_the_reward_model(run)
    with run.stage(config.algorithm) as tell:  # policy and critic side by side have a thread each
        last = train_policy(policy_settings(run))
        tell(f"reward-model score {last['objective/scores']:.2f}, KL {last['objective/kl']:.1f} nats a response")
    with run.stage("doctor") as tell:
        tell(in_short(diagnose(read_run(run.root / config.algorithm))))
    with run.stage("judgement") as tell:
        judged = evaluate_policies(evaluation_settings(run), functions=[gold])
        tell(f"{judged['prompts']} held-out prompts, {judged['responses_per_prompt']} answers each, by gold score")
    print_table(judged, config.algorithm)
    print_responses(
        json.loads((run.root / "evaluation.json").read_text(encoding="utf-8"))["answers"][:5], config.algorithm
    )
    draw_curves(run.root, config.algorithm, run.root / "curves.png")
    summary = summarise(judged, reward_figures, time.monotonic() - run.started)
    write_atomic(run.root / "summary.json", json.dumps(summary, indent=1) + "\n")
    print(f"\ncurves in {run.path('curves.png')}, figures in {run.path('summary.json')}")
    return summary


@contextmanager
def one_thread() -> Iterator[None]:
    """A second thread gains a tenth for so small a model, and costs threefold where the machine takes a core away."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def up_to_the_reward_model(run: Quickstart) -> dict[str, float]:
    """World, language model, answers, rankings; the figures of the reward model."""
    with run.stage("world") as tell:
        tell(write_world(run))
    with run.stage("pre-training") as tell:
        metrics = sft(pretraining_settings(run))
        tell(f"held-out loss {metrics['loss']:.3f} on {NUM_TEXTS:,} dialogues")
    with run.stage("sft") as tell:
        metrics = sft(sft_settings(run))
        tell(f"held-out loss {metrics['loss']:.3f} on {NUM_DIALOGUES:,} replies of mixed quality")
    with run.stage("answers") as tell:
        written = sample_responses(sampling_settings(run))
        tell(
            f"{written['responses']:,} answers to {written['prompts']:,} prompts, {written['truncated']:.1%} truncated"
        )
    with run.stage("raters") as tell:
        tell(rank_responses(run.config, run.root / "answers.jsonl", run.root / "rankings.jsonl"))
    with run.stage("reward model") as tell:
        metrics = reward(reward_settings(run))
        accuracy, length_only = metrics["accuracy"], metrics["length_accuracy"]
        tell(f"held-out pairwise accuracy {accuracy:.3f} (by length alone {length_only:.3f})")
    return metrics


def gold(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The judge, as a reward function."""
    return [gold_score(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def write_world(run: Quickstart) -> str:
    """Texts, prompts and the untrained model. The splits never write about the same facts."""
    seed = run.config.seed
    write_jsonl(run.root / "data/texts.jsonl", ({"text": text} for text in corpus.pretraining_corpus(seed, NUM_TEXTS)))
    write_jsonl(run.root / "data/dialogues.jsonl", corpus.sft_data(seed, NUM_DIALOGUES))
    unseen = corpus.prompts(seed, NUM_HELD_OUT + NUM_TODAY, "held_out")
    files = {
        "ratings": corpus.prompts(seed, NUM_RATED, "ratings"),
        "rl": corpus.prompts(seed, NUM_PROMPTS, "rl"),
        "held_out": unseen[:NUM_HELD_OUT],
        "today": unseen[NUM_HELD_OUT:],
    }
    for name, prompts in files.items():
        write_jsonl(run.root / f"data/{name}.jsonl", ({"prompt": prompt} for prompt in prompts))
    tokenizer = build_tokenizer()
    tiny_llama(run.root / "untrained", tokenizer, seed)
    return f"a support desk of {len(tokenizer)} words; a Llama that knows none of them"


def pretraining_settings(run: Quickstart) -> SftConfig:
    return parse(
        SftConfig,
        {
            "output": run.path("pretrain"),
            "seed": run.config.seed,
            "model": run.path("untrained"),
            "data": {"path": run.path("data/texts.jsonl"), "eval_fraction": 0.01},
            "batch_size": 16,
            "optim": {"learning_rate": 4e-3, "schedule": "linear", "warmup_steps": 30, "weight_decay": 0.01},
        },
    )


def sft_settings(run: Quickstart) -> SftConfig:
    return parse(
        SftConfig,
        {
            "output": run.path("sft"),
            "seed": run.config.seed,
            "model": run.path("pretrain/model"),
            "data": {"path": run.path("data/dialogues.jsonl"), "eval_fraction": 0.05},
            "batch_size": 32,
            "optim": {"learning_rate": 5e-4, "schedule": "linear"},
        },
    )


def sampling_settings(run: Quickstart) -> SampleConfig:
    return parse(
        SampleConfig,
        {
            "model": run.path("sft/model"),
            "prompts": {"path": run.path("data/ratings.jsonl")},
            "output": run.path("answers.jsonl"),
            "seed": run.config.seed,
            "sampling": {
                "num_responses": RESPONSES_PER_PROMPT,
                "max_response_tokens": MAX_RESPONSE_TOKENS,
                "batch_size": 256,
            },
        },
    )


def reward_settings(run: Quickstart) -> RewardConfig:
    return parse(
        RewardConfig,
        {
            "output": run.path("reward"),
            "seed": run.config.seed,
            "model": run.path("sft/model"),
            "data": {"path": run.path("rankings.jsonl"), "eval_fraction": 0.1},
            "loss": "listwise",
            "template": "{prompt}{response}</s>",
            "epochs": 3,
            "batch_size": 16,
            "optim": {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 10},
        },
    )


def policy_settings(run: Quickstart) -> TrainConfig:
    ppo = run.config.algorithm == "ppo"
    return parse(
        TrainConfig,
        {
            "output": run.path(run.config.algorithm),
            "seed": run.config.seed,
            "steps": 28 if ppo else 32,
            "policy": {"model": run.path("sft/model")},
            "critic": {"sharing": "separate"},
            "prompts": {"path": run.path("data/rl.jsonl"), "max_tokens": 64},
            "rollout": {"batch_size": 64 if ppo else 128, "max_response_tokens": MAX_RESPONSE_TOKENS},
            "rewards": [{"model": run.path("reward/model")}],
            "reward": {"missing_eos_penalty": 1.0},
            "algorithm": {"name": run.config.algorithm, "kl_coef": 0.03},
            # Three steps of warm-up: PPO's first update follows a critic that knows nothing yet.
            "optim": {"learning_rate": 3e-4 if ppo else 1e-3, "warmup_steps": 48 if ppo else 0},
            "checkpoint": {"every": 0},
            "log": {"rollouts_per_step": 32},
        },
    )


def evaluation_settings(run: Quickstart) -> EvaluateConfig:
    return parse(
        EvaluateConfig,
        {
            "policy": run.path(f"{run.config.algorithm}/policy"),
            "against": run.path("sft/model"),
            "prompts": {"path": run.path("data/held_out.jsonl")},
            "rewards": [{"model": run.path("reward/model"), "weight": 0.0}],
            "output": run.path("evaluation.json"),
            "seed": run.config.seed,
            "sampling": {"num_responses": 4, "max_response_tokens": MAX_RESPONSE_TOKENS, "batch_size": 256},
        },
    )


def in_short(diagnosis: Diagnosis) -> str:
    """The verdict, and the first finding."""
    first = next((finding for finding in diagnosis.findings if finding.is_open), None)
    return f"{diagnosis.verdict}: {first.name}, {first.title}" if first else f"{diagnosis.verdict}: no problems found"


def summarise(judged: Mapping[str, Any], reward_figures: Mapping[str, float], seconds: float) -> dict[str, float]:
    return {
        "seconds": round(seconds, 1),
        "gold_score_sft": judged["against"]["score"],
        "gold_score_policy": judged["policy"]["score"],
        "gold_win_rate": judged["win_rate"],
        "gold_win_rate_low": judged["win_rate_low"],
        "gold_win_rate_high": judged["win_rate_high"],
        "reward_model_accuracy": reward_figures["accuracy"],
        "kl": judged["policy"]["kl"],
    }


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
