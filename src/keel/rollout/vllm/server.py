"""Start vLLM's server in its own environment, watch it, and end it."""

import os
import subprocess
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from keel.errors import ConfigError, EngineError
from keel.rollout.vllm.client import EngineClient
from keel.rollout.vllm.folder import VARIABLE, EngineFolder

TESTED = "0.32"
"""Versions of vLLM that this client was tested with: its routes change from month to month."""
SUPERVISOR = Path(__file__).with_name("supervisor.py")
HIDDEN = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC_", "PYTHON", "VLLM_", "KEEL_FAILPOINT")
"""Prefixes of variables that the engine must not see: those of torchrun, and what changes how it samples."""
START_POLL_SECONDS = 0.2
GRACE_SECONDS = 15.0
USE_OWN = "use rollout.engine: keel"
CAUSES = (
    (
        "No module named 'vllm'",
        "vLLM is not installed there",
        "install it (docs/how-to/vllm.md), or set rollout.vllm.python",
    ),
    ("nms does not exist", "torchvision and torch do not fit together", "pip uninstall torchvision torchaudio there"),
    ("Unsupported CPU attention", "vLLM cannot run this model on a CPU", USE_OWN),
    ("are not supported for now", "vLLM does not know this architecture", USE_OWN),
    ("out of memory", "the memory of the device is too small", "lower rollout.vllm.memory"),
    ("Free memory on device", "the memory of the device is too small", "lower rollout.vllm.memory"),
)
"""Texts of the log of a server that could not start: cause and fix"""


@dataclass(frozen=True)
class ServerSettings:
    """How the server is started."""

    python: str
    dtype: str
    max_model_tokens: int  # of a prompt with its response
    devices: str | None  # CUDA_VISIBLE_DEVICES; None: a CPU
    memory: float  # share of the device's memory
    sleeps: bool  # whether it frees the memory of the device while the trainer computes
    timeout_seconds: float
    log: Path


class Server:
    """A running server. It ends with `close`, and when this process ends in any way."""

    def __init__(self, settings: ServerSettings, folder: EngineFolder, model: Path) -> None:
        """Start the server, and wait until it is healthy. Raises ConfigError if it cannot start."""
        self.settings, self.folder = settings, folder
        self.client = EngineClient(folder.socket, settings.timeout_seconds, self.require_alive)
        settings.log.parent.mkdir(parents=True, exist_ok=True)
        with settings.log.open("ab") as log:
            self._log_start = log.tell()
            self._process = self._start(log.fileno(), model)
        self._finalizer = weakref.finalize(self, _end, self._process, folder)
        try:
            self._wait_until_healthy()
            self._check_version()
        except BaseException:
            self.close()
            raise

    def require_alive(self) -> None:
        """Raise EngineError if the server has ended."""
        if self._process.poll() is not None:
            raise EngineError(
                f"the engine has ended ({self.last_line()})", str(self.settings.log), "continue with --resume"
            )

    def last_line(self) -> str:
        """Return the last line of the log that names an error, or the last one."""
        lines = [line.strip() for line in self._log_text().splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line]
        return (errors or lines or ["nothing in its log"])[-1][-300:]

    def close(self) -> None:
        """End all processes of the server, and delete its folder."""
        self._finalizer()

    def _start(self, log: int, model: Path) -> "subprocess.Popen[bytes]":
        arguments = server_command(self.settings, self.folder.socket, model)
        supervised = [self.settings.python, "-I", str(SUPERVISOR), str(self.folder.path), *arguments]
        try:
            return subprocess.Popen(
                supervised,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=server_environment(self.settings, self.folder.path),
                start_new_session=True,  # Ctrl-C ends the trainer, which ends the engine
            )
        except OSError as error:
            self.folder.delete()
            raise ConfigError(
                f"{self.settings.python} cannot be run: {error.strerror}",
                "rollout.vllm.python",
                "name the Python interpreter of an environment with vLLM (docs/how-to/vllm.md)",
            ) from error

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + self.settings.timeout_seconds
        while not self.client.is_healthy():
            if self._process.poll() is not None:
                what, fix = self._start_failure()
                raise ConfigError(f"vLLM did not start: {what}", str(self.settings.log), fix)
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"vLLM was not ready within {self.settings.timeout_seconds:g} s ({self.last_line()})",
                    str(self.settings.log),
                    "raise rollout.vllm.timeout_seconds",
                )
            time.sleep(START_POLL_SECONDS)

    def _check_version(self) -> None:
        version = str(self.client.get("/version").get("version"))
        if not version.startswith(f"{TESTED}."):
            raise ConfigError(
                f"vLLM {version} has not been tested with keel",
                "rollout.vllm.python",
                f"install vLLM {TESTED} (docs/how-to/vllm.md)",
            )

    def _start_failure(self) -> tuple[str, str]:
        text = self._log_text()
        for mark, cause, fix in CAUSES:
            if mark in text:
                return cause, fix
        return self.last_line(), f"read the log; or {USE_OWN}"

    def _log_text(self) -> str:
        try:
            with self.settings.log.open("rb") as log:
                log.seek(self._log_start)
                return log.read().decode(errors="replace")
        except OSError:
            return ""


def server_command(settings: ServerSettings, socket: Path, model: Path) -> list[str]:
    """Return the arguments of the interpreter for the server.

    `vllm serve` needs a package named vllm, which the CPU build is not; the module works in both.
    """
    command = ["-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--served-model-name", "policy", "--uds", str(socket)]
    command += ["--dtype", settings.dtype, "--max-model-len", str(settings.max_model_tokens)]
    # The log-probs of the tokens that were sampled, at their temperature.
    command += ["--logprobs-mode", "processed_logprobs"]
    # Otherwise top-k, top-p and penalties of the model's folder change what is sampled.
    command += ["--generation-config", "vllm"]
    # Keys and values of prompts that other weights have read must never be used again.
    command += ["--no-enable-prefix-caching", "--disable-log-stats", "--disable-uvicorn-access-log"]
    if settings.devices is None:
        return [*command, "--enforce-eager"]
    command += ["--gpu-memory-utilization", str(settings.memory)]
    return [*command, "--enable-sleep-mode"] if settings.sleeps else command


def server_environment(settings: ServerSettings, folder: Path) -> dict[str, str]:
    """Return the environment of the server: that of this process, without what would change its results.

    VLLM_ALLOW_INSECURE_SERIALIZATION is not set, so that no request is unpickled.
    """
    environment: Mapping[str, str] = os.environ
    kept = {name: value for name, value in environment.items() if not name.startswith(HIDDEN)}
    kept |= {
        VARIABLE: str(folder),
        "VLLM_SERVER_DEV_MODE": "1",  # the routes that load weights
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",  # every file is in the folder
        "PYTHONUNBUFFERED": "1",
    }
    if settings.devices is not None:
        return kept | {"CUDA_VISIBLE_DEVICES": settings.devices}
    threads = kept.get("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    return kept | {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": threads,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TORCHDYNAMO_DISABLE": "1",  # the first response would wait for a compiler
    }


def gpu_number(device: torch.device, chosen: str | None) -> str | None:
    """Return the number of the engine's GPU among all of the machine; None on a CPU.

    Args:
        device: of the policy, whose number counts only the GPUs that this process sees.
        chosen: number that takes its place.
    """
    if device.type != "cuda" or chosen is not None:
        return chosen if device.type == "cuda" else None
    visible = [number.strip() for number in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if number.strip()]
    index = device.index or 0
    return visible[index] if index < len(visible) else str(index)


def _end(process: "subprocess.Popen[bytes]", folder: EngineFolder) -> None:
    """Close the pipe, which the supervisor takes as the end, and end what is left after a while."""
    if process.stdin is not None:
        with suppress(OSError):
            process.stdin.close()
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    folder.delete()
