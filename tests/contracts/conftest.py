"""One tiny run of each kind, made through the command line when a test first asks for it."""

import json
from pathlib import Path
from typing import Any

import pytest

from keel.cli.main import main
from keel.run.read.run import Run, read_run

FUNCTIONS = """
def quality_keyword(completions, log_metric, log_extra, **columns):
    log_metric("words", sum(len(text.split()) for text in completions) / len(completions))
    log_extra("prompt", [text[::-1] for text in completions])
    return [float(text.count("w3")) for text in completions]

def quality(completions, **columns):
    return [-float(len(text.split())) for text in completions]
"""
SCORE = "def score(completions, topic): return [float(len(text)) for text in completions]\n"
LEARNING = {
    "ppo": {"algorithm.name": "ppo", "reward.normalize": "running", "evaluate.every": 1, "algorithm.target_kl": 1.0},
    "shared": {"algorithm.name": "ppo", "critic.sharing": "shared", "algorithm.kl_in": "loss"},
    "a2c": {"algorithm.name": "a2c", "algorithm.entropy_coef": 0.01},
    "reinforce": {"algorithm.name": "reinforce", "algorithm.kl_coef": 0.0},
    "rloo": {"algorithm.name": "rloo", "reward.segments": "w3"},
    "grpo": {"algorithm.name": "grpo", "algorithm.max_approx_kl": 0.5},
}
SUPERVISED = {"sft": {}, "reward": {"gate": "accuracy=0"}, "ensemble": {"members": 2}, "dpo": {}}
STEPS = 4


class Runs:
    """Makes the run of a name once, in a folder that all tests share."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder = model, folder
        (folder / "functions.py").write_text(FUNCTIONS)
        for name in "ab":
            (folder / name).mkdir()
            (folder / name / "rewards.py").write_text(SCORE)
        self._write("prompts", [{"prompt": f"w{n} w{n + 1}", "topic": f"t{n % 2}"} for n in range(1, 17)])
        self._write("heldout", [{"prompt": f"w{n} w{n + 2}", "topic": "t"} for n in range(1, 5)])
        self._write("texts", [{"prompt": f"w{n}", "completion": " w2 w3"} for n in range(1, 17)])
        pairs = [{"prompt": f"w{n} w{n + 3}", "chosen": " w2 w3", "rejected": f" w4 w{n}"} for n in range(1, 25)]
        self._write("pairs", pairs)

    def _write(self, name: str, rows: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (self.folder / f"{name}.jsonl").write_text(text, encoding="utf-8")

    def path(self, name: str) -> Path:
        """The run's folder. The run is made where it is not there yet."""
        if not (self.folder / name).exists():
            assert main(self.command(name)) == 0
        return self.folder / name

    def run(self, name: str) -> Run:
        return read_run(self.path(name))

    def command(self, name: str, output: str | None = None, **changes: Any) -> list[str]:
        """The command of a run, with some settings changed."""
        own = self._learning(name) if name in LEARNING else self._supervised(name)
        values = {"output": str(self.folder / (output or name)), "optim.schedule": "constant", **own, **changes}
        options = [part for key, value in values.items() for part in (f"--{key.replace('_', '-')}", _option(value))]
        verb = "train" if name in LEARNING else "reward" if name == "ensemble" else name
        return [verb, *options]

    def _learning(self, name: str) -> dict[str, Any]:
        judge = self.path("ensemble" if name == "grpo" else "reward") / "model"
        rewards = [
            {"function": str(self.folder / "functions.py:quality_keyword")},
            {"function": str(self.folder / "functions.py:quality"), "weight": 0.0},
            {"function": str(self.folder / "a/rewards.py:score"), "weight": 0.01},
            {"function": str(self.folder / "b/rewards.py:score"), "weight": 0.0},
            {"model": str(judge), "weight": 0.1},
        ]
        return {
            "policy.model": self.model,
            "prompts.path": self.folder / "prompts.jsonl",
            "evaluate.prompts": self.folder / "heldout.jsonl",
            "steps": STEPS,
            "rollout.batch_size": 8,
            "rollout.max_response_tokens": 5,
            "checkpoint.every": 2,
            "rewards": rewards,
            **LEARNING[name],
        }

    def _supervised(self, name: str) -> dict[str, Any]:
        data = {"data.path": self.folder / f"{'texts' if name == 'sft' else 'pairs'}.jsonl", "data.eval_fraction": 0.5}
        return {"model": self.model, "batch_size": 4, "max_tokens": 16, "eval_every": 1, **data, **SUPERVISED[name]}


def _option(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list) else str(value)


@pytest.fixture(scope="session")
def runs(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tiny_policy, tmp_path_factory.mktemp("contracts"))
