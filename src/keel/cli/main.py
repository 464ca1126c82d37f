"""Entry point of the command line: run a verb, and turn an exception into one line and an exit code."""

import contextlib
import errno
import io
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from importlib import import_module

from keel import __version__
from keel.errors import ConfigError, Interrupted, KeelError
from keel.interrupts import interrupts_handled, pending_interrupt
from keel.terminal import print_line

# In the order of the pipeline. Each verb is a module of this package with a constant `VERB` and a function `run`.
VERBS = {
    "quickstart": "run the full pipeline on a built-in example, in minutes",
    "sft": "fine-tune a language model on demonstrations or text",
    "sample": "sample a model's responses to a file of prompts",
    "rank": "let people rank responses in a web page",
    "data": "check a data file, and convert it",
    "reward": "train a reward model, or an ensemble, on preference pairs or rankings",
    "dpo": "train a policy on preference pairs or rankings, without a reward model",
    "train": "train a policy on rewards (ppo, a2c, reinforce, rloo, grpo, reinforce++)",
    "plan": "forecast memory and time of a training run, without loading its weights",
    "evaluate": "evaluate policies, alone or against another policy",
    "doctor": "find out what is wrong with runs, and what to change",
    "report": "write an HTML page about one run, or comparing several",
    "serve": "show all runs under a folder in a live web page",
    "drift": "test whether a run's reward models still apply to today's prompts",
    "serve-reward": "serve a reward model or a reward function over HTTP",
}
RESUMABLE = ("sft", "reward", "dpo", "train")
EXIT_CODES = {
    0: "done",
    1: "a gate is not met, memory ran out, or an unexpected error",
    2: "settings, data or models cannot be used; nothing was started",
    3: "numbers left the finite range, the policy collapsed, or the doctor stopped the run",
    4: "a scorer failed; the finished steps are saved",
    5: "the disk or the run folder failed",
    75: "interrupted, or another process of the run is gone; continue with `--resume`",
    130: "interrupted, and there is nothing to resume",
    141: "the program that reads the output has closed it",
}
STORAGE_FAILURES = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}
BROKEN_PIPE = 141  # 128 + SIGPIPE, as a shell reports it
# How often a thread of torch checks for work before it sleeps; OpenMP reads it when torch loads. Its default of 300,000
# makes sampling five times slower while another process uses one of two cores (docs/performance.md).
SPIN_COUNT = "10000"
OUT_OF_MEMORY_FIX = "lower microbatch_tokens, or batch_size"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code, one of `EXIT_CODES`."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    debug = "--debug" in arguments
    with interrupts_handled():
        try:
            with contextlib.nullcontext() if debug else _libraries_silenced():
                return _dispatch([argument for argument in arguments if argument != "--debug"])
        except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
            # Python flushes standard output when it exits, which would fail again and print a traceback.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return BROKEN_PIPE
        except SystemExit:
            raise
        except BaseException as error:  # noqa: BLE001 - panics of Rust libraries derive from BaseException
            if debug:
                traceback.print_exc()
            signal_name = pending_interrupt()
            # A library may catch the interrupt and raise another error, for example during an import.
            if signal_name and not isinstance(error, KeelError):
                error = Interrupted(signal_name)
            elif os.environ.get("WORLD_SIZE", "1") != "1":  # also while the processes meet, and while models load
                error = import_module("keel.world").find_lost_process(error) or error
            verb = next((argument for argument in arguments if argument != "--debug"), "")
            code, line = _describe_error(error, resumable=verb in RESUMABLE)
            print_line(line)
            return code


def _dispatch(arguments: list[str]) -> int:
    verb = arguments[0] if arguments else ""
    if verb in ("", "-h", "--help", "help"):
        print(_help())
        return 0 if verb else ConfigError.exit_code
    if verb == "--version":
        print(f"keel {__version__}")
        return 0
    if verb not in VERBS:
        if verb.startswith("-"):
            raise ConfigError(f"unknown option {verb}", fix="write options after the verb, or see keel --help")
        raise ConfigError(f"unknown verb {verb}; {_nearest(verb)}", fix="keel --help")
    _run(verb, arguments[1:])
    return 0


def _run(verb: str, arguments: list[str]) -> None:
    """Run a verb. With --json, standard output holds one JSON object and nothing else."""
    run = import_module(f"keel.cli.{verb.replace('-', '_')}").run
    if os.environ.get("RANK", "0") != "0":  # under torchrun, the main process prints for all
        with contextlib.redirect_stdout(io.StringIO()):
            run([argument for argument in arguments if argument != "--json"])
        return
    if "--json" not in arguments:
        run(arguments)
        return
    failure = None
    # Everything else that is printed, by libraries too, goes to standard error.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            metrics = run([argument for argument in arguments if argument != "--json"])
        except KeelError as error:
            if error.metrics is None:
                raise
            metrics, failure = error.metrics, error
    from keel.run.json_values import replace_non_finite

    print(json.dumps(replace_non_finite(metrics)))  # JSON has no NaN and no infinity
    if failure is not None:
        raise failure


def _describe_error(error: BaseException, resumable: bool = False) -> tuple[int, str]:
    """Return the exit code for an exception, and the line that is printed."""
    if isinstance(error, KeelError):
        return error.exit_code, f"error: {error}"
    if isinstance(error, Interrupted) and resumable:
        return error.exit_code, f"interrupted by {error} -> continue with --resume"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, OSError) and error.errno in STORAGE_FAILURES:
        return 5, f"error: {error.filename or 'storage'}: {error.strerror} -> free or repair the storage"
    text = " ".join(str(error).split())
    # The first is torch's error of a GPU, the second its error of a CPU.
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return 1, f"error: out of memory: {text[:200]} -> {OUT_OF_MEMORY_FIX}"
    # An import that runs out of memory raises an ImportError with the text of ENOMEM.
    if isinstance(error, MemoryError) or os.strerror(errno.ENOMEM).lower() in text.lower():
        return 1, "error: out of memory -> end other programs, or use a machine with more memory"
    return 1, f"unexpected {type(error).__name__}: {text[:500]}; run again with --debug to see where"


@contextlib.contextmanager
def _libraries_silenced() -> Iterator[None]:
    """Inside, libraries print no warnings, log lines or progress bars. --debug leaves them on."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _help() -> str:
    verbs = "\n".join(f"  {verb:<14}{purpose}" for verb, purpose in VERBS.items())
    return f"""keel {__version__}: train language models from human feedback (RLHF)

usage: keel VERB [RUN.yaml] [--setting value ...] [--debug] [--json]

{verbs}

keel VERB --help shows an example and the main settings, --help-all every setting.
Start with: keel quickstart"""


def _nearest(verb: str) -> str:
    from difflib import get_close_matches

    match = get_close_matches(verb, VERBS, n=1, cutoff=0.5)
    return f"did you mean {match[0]}?" if match else f"known: {', '.join(VERBS)}"


if __name__ == "__main__":
    sys.exit(main())
