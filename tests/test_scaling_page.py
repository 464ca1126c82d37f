"""Every command and script of docs/scaling.md runs, with gloo, two processes and a tiny model.

What differs from the page: 8 GPUs of a machine are two processes, or one on each of two machines, which are both this
one. `srun` and `scontrol` are stand-ins that do the same without a cluster.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

import keel
from keel.run.folder import RunFolder

from .runs import PROMPTS, settings

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
SECONDS = 600  # on a busy machine; together they take less than a minute on two idle cores
SRUN = '#!/bin/sh\n"$@" &\n"$@" && wait $!\n'
SCONTROL = "#!/bin/sh\necho 127.0.0.1\n"
REWARDS = """
def share_of_w3(completions, **_):
    return [text.split().count("w3") / max(1, len(text.split())) for text in completions]
"""


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


def commands() -> list[str]:
    return [line for block in blocks("") for line in block.splitlines()]


def pod_command() -> list[str]:
    """The command of the Kubernetes job."""
    [manifest] = blocks("yaml")
    service, job = yaml.safe_load_all(manifest)
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    names = job["metadata"]["name"], service["metadata"]["name"]
    assert f"{names[0]}-0.{names[1]}:29500" in container["command"], "the pod of the endpoint has this name"
    assert service["spec"]["selector"] == {"job-name": names[0]}
    assert pod["subdomain"] == names[1]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(argument(container["command"], "--nnodes"))
    return list(container["command"])


def argument(command: Sequence[str], name: str) -> str:
    return command[command.index(name) + 1]


def here(text: str) -> str:
    """The same for this machine: two processes in all, and a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert text.startswith("keel") or "--nproc-per-node 8" in text
    processes = 2 if "--standalone" in text else 1
    text = text.replace("--nproc-per-node 8", f"--nproc-per-node {processes}")
    return re.sub(r"(node0|ppo-0\.keel|\$node0):29500", rf"127.0.0.1:{port}", text)


@pytest.fixture
def place(tiny_policy: Path, tmp_path: Path) -> Path:
    """A folder with the files that the commands name, and with programs of a cluster."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    (tmp_path / "rewards.py").write_text(REWARDS)
    rewards = [{"function": "rewards.py:share_of_w3"}]
    values = settings(tiny_policy, Path("run"), {"steps": 1, "prompts.path": "prompts.jsonl", "rewards": rewards})
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(values))
    evaluation: dict[str, Any] = {"policy": str(tiny_policy), "prompts": {"path": "prompts.jsonl"}, "rewards": rewards}
    evaluation |= {"sampling": {"max_response_tokens": 4}, "output": "run/evaluation.json"}
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(evaluation))
    (tmp_path / "programs").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "programs" / name).write_text(text)
        (tmp_path / "programs" / name).chmod(0o755)
    return tmp_path


def start(command: str, place: Path) -> subprocess.Popen[str]:
    programs = [place / "programs", Path(sys.executable).parent, os.environ["PATH"]]
    changes = {
        "PATH": os.pathsep.join(map(str, programs)),
        "PYTHONPATH": str(Path(keel.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "node[0-1]",
    }
    shell = ["bash", "-euo", "pipefail", "-c", command]
    return subprocess.Popen(
        shell, cwd=place, env=os.environ | changes, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def run(command: str, place: Path, machines: int = 1) -> None:
    """Run a command on each machine. Each must end with exit code 0 and leave a trained policy in `run`."""
    started = [start(command, place) for _ in range(machines)]
    try:
        for machine in started:
            _, errors = machine.communicate(timeout=SECONDS)
            assert machine.returncode == 0, f"{command}\n{errors[-4000:]}"
    finally:
        for machine in started:
            with suppress(ProcessLookupError):  # torchrun ends its processes on SIGTERM
                os.killpg(machine.pid, signal.SIGTERM)
    assert RunFolder(place / "run").holds_result
    processes = json.loads((place / "run" / "began.json").read_text())["machine"]["processes"]
    assert processes == (1 if command.startswith("keel") else 2), command


def test_the_page_has_these_commands() -> None:
    assert len(commands()) == 4
    assert len(blocks("sh")) == len(blocks("yaml")) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "where",
    [
        "one machine",
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("laptop", "machines", "slurm", "pods")),
    ],
)
def test_every_command_of_the_page_runs(where: str, place: Path) -> None:
    laptop, node, evaluate, nodes = commands()
    command, machines = {
        "laptop": (laptop, 1),
        "one machine": (node, 1),
        "machines": (nodes, 2),
        "slurm": (blocks("sh")[0], 1),
        "pods": (" ".join(pod_command()), 2),
    }[where]
    run(here(command), place, machines)
    if where == "one machine":
        run(here(evaluate), place)
        assert json.loads((place / "run" / "evaluation.json").read_text())
