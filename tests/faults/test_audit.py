"""F-26, and no network unasked: Python's own audit events, over every verb."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import keel
from keel.cli.main import VERBS
from keel.data.items import read_unranked_responses
from keel.ranking.store import Store

from ..runs import PROMPTS, settings
from .children import RANKINGS, REWARDS

PROGRAM = """
import json, sys
seen = []

def hook(event, arguments):
    if event == "pickle.find_class" or event.startswith("socket.") and event not in ("socket.__new__",):
        seen.append(f"{event} {arguments!r}"[:300])

sys.addaudithook(hook)
from keel.cli.main import main
code = main(sys.argv[2:])
with open(sys.argv[1], "w") as file:
    json.dump({"code": code, "seen": seen}, file)
"""


def arguments(verb: str, model: Path, folder: Path) -> list[str]:
    """A whole small run of a verb, from settings in a file."""
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    (folder / "rankings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in RANKINGS))
    (folder / "texts.jsonl").write_text("".join(f'{{"prompt": "w{i}", "completion": "w3"}}\n' for i in range(1, 9)))
    scorer = {"rewards": [{"function": f"{folder / 'rewards.py'}:share_of_w3"}]}
    prompts = {"prompts": {"path": str(folder / "prompts.jsonl")}}
    train = settings(model, folder / "run", {"prompts.path": str(folder / "prompts.jsonl"), **scorer})
    small: dict[str, Callable[[], dict[str, Any]]] = {
        "train": lambda: train,
        "plan": lambda: train,
        "sft": lambda: {
            "output": str(folder / "sft"),
            "model": str(model),
            "data": {"path": str(folder / "texts.jsonl")},
        },
        "reward": lambda: {
            "output": str(folder / "rm"),
            "model": str(model),
            "data": {"path": str(folder / "rankings.jsonl"), "eval_fraction": 0.25},
        },
        "dpo": lambda: {
            "output": str(folder / "dpo"),
            "model": str(model),
            "data": {"path": str(folder / "rankings.jsonl"), "eval_fraction": 0.25},
        },
        "sample": lambda: {"model": str(model), "output": str(folder / "answers.jsonl"), **prompts},
        "evaluate": lambda: {"policy": str(model), "against": str(model), **prompts, **scorer},
    }
    if verb == "quickstart":
        return [verb, "--output", str(folder / "run")]
    if verb == "rank":  # what it does besides serving its pages
        with closing(Store.open(str(folder / "ratings.db"))) as store:
            store.add_items(read_unranked_responses(str(folder / "rankings.jsonl")))
        return [verb, "--stats", "--store", str(folder / "ratings.db")]
    (folder / "run.yaml").write_text(json.dumps(small[verb]()))
    return [verb, str(folder / "run.yaml")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "verb",
    [
        pytest.param(verb, marks=() if verb in ("train", "sample") else pytest.mark.exhaustive)
        for verb in VERBS
        if verb not in ("serve-reward", "serve")  # which are there to open one
    ],
)
def test_f26_no_pickle_is_read_and_no_socket_opened(verb: str, tiny_policy: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment["PYTHONPATH"] = str(Path(keel.__file__).parents[1])
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "audit.json"), *arguments(verb, tiny_policy, tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "audit.json").read_text()) == {"code": 0, "seen": []}


@pytest.mark.slow
def test_f26_the_hook_would_have_seen_them(tmp_path: Path) -> None:
    """The program above, with a verb that does what none may do."""
    doing = "import pickle, socket; pickle.loads(pickle.dumps(socket.socket)); socket.getaddrinfo('127.0.0.1', 1)"
    program = PROGRAM.replace("code = main(sys.argv[2:])", f"{doing}; code = 0")
    environment = os.environ | {"PYTHONPATH": str(Path(keel.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "audit.json")], check=True, env=environment)
    seen = json.loads((tmp_path / "audit.json").read_text())["seen"]
    assert {event.split()[0] for event in seen} == {"pickle.find_class", "socket.getaddrinfo"}
