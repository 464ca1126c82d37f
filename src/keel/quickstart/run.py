"""Run all stages of `keel quickstart`. Files pass between the stages, as between the commands of keel.

Only the simulated raters and the final evaluation use the gold score.
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
from keel.quickstart.report import draw_curves, print_comparison, print_responses
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
NUM_TODAY = 300  # prompts for `keel drift`, as if they came in while the policy is in use


@dataclass
class Quickstart:
    """Paths and start time of a quickstart."""

    config: QuickstartConfig
    started: float = field(default_factory=time.monotonic)

    @property
    def root(self) -> Path:
        return Path(self.config.output)

    def path(self, name: str) -> str:
        return str(self.root / name)

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[str], None]]:
        """Print a line at the end of a stage: its name, the summary passed to the yielded function, its seconds."""
        start, summaries = time.monotonic(), [""]
        yield lambda text: summaries.append(text)
        print(f"{name:<14}{summaries[-1]:<78}{time.monotonic() - start:6.1f} s", flush=True)


def quickstart(config: QuickstartConfig) -> dict[str, Any]:
    """Run all stages in the folder `config.output`, and return the content of summary.json."""
    run = Quickstart(config)
    if (run.root / "data").exists():
        raise ConfigError(
            "this folder already holds a quickstart", where=config.output, fix="choose another --output, or delete it"
        )
    if config.human:
        check_rank_settings(parse(RankConfig, {}))  # a port in use stops the command now, not in a minute
    with one_thread():
        reward_metrics = run_reward_stages(run)
    with run.stage(config.algorithm) as finish:  # all threads, since policy and critic run concurrently
        last = train_policy(policy_settings(run))
        finish(f"reward-model score {last['objective/scores']:.2f}, KL {last['objective/kl']:.1f} nats a response")
    with run.stage("doctor") as finish:
        finish(describe_diagnosis(diagnose(read_run(run.root / config.algorithm))))
    with run.stage("evaluation") as finish:
        metrics = evaluate_policies(evaluation_settings(run), functions=[gold])
        finish(
            f"{metrics['prompts']} held-out prompts, {metrics['responses_per_prompt']} responses each, by gold score"
        )
    print_comparison(metrics, config.algorithm)
    rows = json.loads((run.root / "evaluation.json").read_text(encoding="utf-8"))["answers"]
    print_responses(rows[:5], config.algorithm)
    draw_curves(run.root, config.algorithm, run.root / "curves.png")
    summary = summarise(metrics, reward_metrics, time.monotonic() - run.started)
    write_atomic(run.root / "summary.json", json.dumps(summary, indent=1) + "\n")
    print(f"\ncurves in {run.path('curves.png')}, metrics in {run.path('summary.json')}")
    return summary


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread inside the block.

    For so small a model a second thread gains 10%, and makes it three times slower if another program uses a core.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run_reward_stages(run: Quickstart) -> dict[str, float]:
    """Run the stages up to the reward model, and return its metrics: data, language model, responses, rankings."""
    with run.stage("world") as finish:
        finish(write_world(run))
    with run.stage("pre-training") as finish:
        metrics = sft(pretraining_settings(run))
        finish(f"held-out loss {metrics['loss']:.3f} on {NUM_TEXTS:,} dialogues")
    with run.stage("sft") as finish:
        metrics = sft(sft_settings(run))
        finish(f"held-out loss {metrics['loss']:.3f} on {NUM_DIALOGUES:,} replies of mixed quality")
    with run.stage("responses") as finish:
        counts = sample_responses(sampling_settings(run))
        finish(
            f"{counts['responses']:,} responses to {counts['prompts']:,} prompts, {counts['truncated']:.1%} truncated"
        )
    with run.stage("raters") as finish:
        finish(rank_responses(run.config, run.root / "answers.jsonl", run.root / "rankings.jsonl"))
    with run.stage("reward model") as finish:
        metrics = reward(reward_settings(run))
        accuracy, length_only = metrics["accuracy"], metrics["length_accuracy"]
        finish(f"held-out pairwise accuracy {accuracy:.3f} (by length alone {length_only:.3f})")
    return metrics


def gold(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Return gold scores. The signature is that of a reward function."""
    return [gold_score(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def write_world(run: Quickstart) -> str:
    """Write texts, prompts and the untrained model, and return a summary in words. No two splits share facts."""
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
    return f"texts of {len(tokenizer)} different words; a Llama with random weights"


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
            # Three steps of warm-up (of 16 optimizer steps each), because PPO starts with an untrained critic.
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


def describe_diagnosis(diagnosis: Diagnosis) -> str:
    """Return the verdict, and the first open finding."""
    first = next((finding for finding in diagnosis.findings if finding.is_open), None)
    return f"{diagnosis.verdict}: {first.name}, {first.title}" if first else f"{diagnosis.verdict}: no problems found"


def summarise(metrics: Mapping[str, Any], reward_metrics: Mapping[str, float], seconds: float) -> dict[str, float]:
    return {
        "seconds": round(seconds, 1),
        "gold_score_sft": metrics["against"]["score"],
        "gold_score_policy": metrics["policy"]["score"],
        "gold_win_rate": metrics["win_rate"],
        "gold_win_rate_low": metrics["win_rate_low"],
        "gold_win_rate_high": metrics["win_rate_high"],
        "reward_model_accuracy": reward_metrics["accuracy"],
        "kl": metrics["policy"]["kl"],
    }


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
