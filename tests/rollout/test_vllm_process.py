"""The engine as a process: it starts, is watched, and leaves no process behind."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from keel.errors import ConfigError, EngineError
from keel.models.loading import load_causal_lm, load_tokenizer
from keel.rollout.vllm.folder import PREFIX, VARIABLE, EngineFolder, base_folder, sweep_folders
from keel.rollout.vllm.server import Server, ServerSettings, gpu_number, server_command, server_environment

from .vllm_stub import stub_python

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at processes in /proc")


@pytest.fixture(autouse=True)
def own_base_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Engines of other runs on this machine stay out of sight. The path is short, since it is part of a socket's."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr("keel.rollout.vllm.folder.IN_MEMORY", Path(folder))
        yield


def settings_of(python: Path | str, folder: Path, timeout: float = 60.0) -> ServerSettings:
    return ServerSettings(str(python), "float32", 64, None, 0.4, False, timeout, folder / "run" / "engine.log")


def start(python: Path | str, model: Path, tmp_path: Path, timeout: float = 60.0) -> Server:
    folder = EngineFolder()
    path = folder.write_model(load_causal_lm(str(model)), load_tokenizer(str(model)))
    return Server(settings_of(python, tmp_path, timeout), folder, path)


def processes(folder: Path) -> list[int]:
    """Processes that were started for an engine folder."""
    numbers = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment, state = (
                (path / "environ").read_bytes(),
                (path / "stat").read_text().rpartition(")")[2].split()[0],
            )
        except OSError:
            continue
        if f"{VARIABLE}={folder}".encode() in environment.split(b"\0") and state != "Z":
            numbers.append(int(path.name))
    return numbers


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_it_starts_serves_and_ends_without_a_trace(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_BATCH_INVARIANT"):
        monkeypatch.setenv(name, "1")
    server = start(stub_python(tmp_path, "worker"), tiny_policy, tmp_path)
    folder = server.folder.path
    assert folder.stat().st_mode & 0o777 == 0o700
    assert server.client.get("/weight_info") == {"weight_version": "default"}
    seen = json.loads((tmp_path / "started").read_text())["environment"]
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "VLLM_ALLOW_INSECURE_SERIALIZATION"} & seen.keys()
    assert (seen["VLLM_NO_USAGE_STATS"], seen["DO_NOT_TRACK"], seen["HF_HUB_OFFLINE"]) == ("1", "1", "1")
    assert len(processes(folder)) == 3  # supervisor, server, worker
    server.close()
    assert processes(folder) == []
    assert not folder.exists()
    server.close()


def test_f49_an_engine_that_dies_is_reported_and_its_worker_ends(tiny_policy: Path, tmp_path: Path) -> None:
    server = start(stub_python(tmp_path, "worker"), tiny_policy, tmp_path)
    folder = server.folder.path
    os.kill(json.loads((tmp_path / "started").read_text())["pid"], signal.SIGKILL)
    with pytest.raises(EngineError) as caught:
        server.client.get("/weight_info")
    assert caught.value.exit_code == 75
    wait_for(lambda: processes(folder) == [])
    server.close()
    assert not folder.exists()


def test_f49_a_supervisor_that_is_killed_is_noticed_and_nothing_is_left(tiny_policy: Path, tmp_path: Path) -> None:
    server = start(stub_python(tmp_path), tiny_policy, tmp_path)
    folder = server.folder.path
    os.kill(server._process.pid, signal.SIGKILL)
    server._process.wait()
    with pytest.raises(EngineError, match="has ended"):
        server.client.get("/weight_info")
    server.close()
    assert processes(folder) == []


TRAINER = """
import sys, time
from pathlib import Path
from tests.rollout.test_vllm_process import start
server = start(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
print(server.folder.path, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_f56_the_engine_ends_with_the_trainer(number: signal.Signals, tiny_policy: Path, tmp_path: Path) -> None:
    python = stub_python(tmp_path, "worker")
    command = [sys.executable, "-c", TRAINER, str(python), str(tiny_policy), str(tmp_path)]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'src'}"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as trainer:
        assert trainer.stdout is not None
        folder = Path(trainer.stdout.readline().strip())
        assert len(processes(folder)) == 3
        trainer.send_signal(number)
    wait_for(lambda: processes(folder) == [])
    wait_for(lambda: not folder.exists())


def test_f56_leftovers_of_a_trainer_that_is_gone_are_swept(tiny_policy: Path, tmp_path: Path) -> None:
    """A trainer and its supervisor were killed together: the next start ends the server and deletes the folder."""
    left = base_folder() / f"{PREFIX}test-{os.getpid()}"
    left.mkdir(mode=0o700)
    (left / "lock").touch()
    environment = server_environment(settings_of(sys.executable, tmp_path), left)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=environment) as orphan:
        sweep_folders()
        assert orphan.wait(10) == -signal.SIGKILL
    assert not left.exists()


def test_the_folder_of_a_living_trainer_is_kept() -> None:
    folder = EngineFolder()
    sweep_folders()
    assert folder.path.exists()
    folder.delete()


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("exit:ModuleNotFoundError:_No_module_named_'vllm'", "vLLM is not installed there"),
        ("exit:RuntimeError:_operator_torchvision::nms_does_not_exist", "torchvision"),
        ("exit:ValueError:_Unsupported_CPU_attention_configuration:_head_dim=8", "cannot run this model on a CPU"),
        ("exit:Model_architectures_['X']_are_not_supported_for_now", "does not know this architecture"),
        ("exit:torch.OutOfMemoryError:_CUDA_out_of_memory", "memory"),
        ("exit:SomeError:_something_else", "SomeError: something else"),
        ("version", "0.33.1 has not been tested"),
    ],
)
def test_f48_what_keeps_the_engine_from_starting_is_named(
    fault: str, what: str, tiny_policy: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        start(stub_python(tmp_path, fault), tiny_policy, tmp_path)
    assert caught.value.fix
    assert not list(base_folder().glob(f"{PREFIX}*"))


def test_f48_an_engine_that_is_not_ready_in_time(tiny_policy: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not ready within 2 s") as caught:
        start(stub_python(tmp_path, "never_ready"), tiny_policy, tmp_path, timeout=2)
    assert caught.value.where == str(tmp_path / "run" / "engine.log")


def test_f48_an_interpreter_that_is_none(tiny_policy: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        start(tmp_path / "missing", tiny_policy, tmp_path)
    assert caught.value.where == "rollout.vllm.python"


@pytest.mark.parametrize(
    ("visible", "device", "chosen", "number"),
    [
        (None, "cpu", None, None),
        (None, "cpu", "1", None),
        (None, "cuda:0", None, "0"),
        ("3,5", "cuda:1", None, "5"),
        ("3,5", "cuda:1", "7", "7"),
        ("", "cuda:2", None, "2"),
    ],
)
def test_the_gpu_of_the_engine_is_that_of_the_policy(
    visible: str | None, device: str, chosen: str | None, number: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_number(torch.device(device), chosen) == number


def test_the_command_and_the_environment_on_a_gpu(tmp_path: Path) -> None:
    settings = ServerSettings("python", "bfloat16", 96, "5", 0.3, True, 60.0, tmp_path / "log")
    command = " ".join(server_command(settings, tmp_path / "socket", tmp_path / "model"))
    for part in ("--gpu-memory-utilization 0.3", "--enable-sleep-mode", "--max-model-len 96", "--dtype bfloat16"):
        assert part in command
    assert "--enforce-eager" not in command
    environment = server_environment(settings, tmp_path)
    assert environment["CUDA_VISIBLE_DEVICES"] == "5"
    assert "TORCHDYNAMO_DISABLE" not in environment
