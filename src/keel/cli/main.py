"""`keel VERB ...`: finds the verb, runs it, and turns what goes wrong into one line and an exit code."""

import contextlib
import errno
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
from keel.terminal import tell

# In the order in which a person needs them; each is a module of this package with a function `run`.
VERBS = {
    "quickstart": "run the full loop on an embedded world, in minutes",
    "sft": "fine-tune a language model on demonstrations or text",
    "sample": "write a model's responses to a file",
    "rank": "let people rank responses in a web page",
    "data": "check a data file, and convert it",
    "reward": "train a reward model, or an ensemble, on human pairs or rankings",
    "dpo": "train a policy on the same pairs or rankings, without a reward model",
    "train": "train a policy on rewards (ppo, a2c, reinforce, rloo, grpo)",
    "plan": "forecast memory and time of a training run, without loading its weights",
    "evaluate": "evaluate a policy, alone and against another",
    "doctor": "diagnose runs: what is wrong, and what to change",
    "report": "write an HTML page about a run, or comparing several",
    "serve": "show all runs under a folder in a live web page",
    "drift": "test whether a run's reward models still apply to today's prompts",
    "serve-reward": "serve a reward model or function to other processes over HTTP",
}
RESUMABLE = ("sft", "reward", "dpo", "train")
STORAGE_FAILURES = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}
BROKEN_PIPE = 141  # as a shell has it: 128 + SIGPIPE
# Rounds that a thread of torch waits awake for the others; read when torch loads. The library's own 300,000 make
# sampling five times slower where another process has one of two cores (docs/performance.md).
SPINS = "10000"
OUT_OF_MEMORY = "lower microbatch_tokens, or batch_size"


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 settings or data, 3 diverged, 4 scorer, 5 storage, 75 interrupted and can go on, 130
    interrupted, 1 else."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    debug = "--debug" in arguments
    with interrupts_handled():
        try:
            with contextlib.nullcontext() if debug else _quiet():
                return _dispatch([argument for argument in arguments if argument != "--debug"])
        except BrokenPipeError:  # whoever reads, such as head, has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor may the last flush fail
            return BROKEN_PIPE
        except SystemExit:
            raise
        except BaseException as error:  # noqa: BLE001 - where everything ends up, panics of Rust libraries included
            if debug:
                traceback.print_exc()
            asked = pending_interrupt()
            if asked and not isinstance(error, KeelError):  # whatever the signal became on its way up, in an import say
                error = Interrupted(asked)
            verb = next((argument for argument in arguments if argument != "--debug"), "")
            code, line = _verdict(error, resumable=verb in RESUMABLE)
            tell(line)
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
        raise ConfigError(
            f"unknown {'option' if verb[0] == '-' else 'verb'} {verb}; {_nearest(verb)}", fix="keel --help"
        )
    _run(verb, arguments[1:])
    return 0


def _run(verb: str, arguments: list[str]) -> None:
    """With --json, standard output holds one JSON object and nothing else."""
    run = import_module(f"keel.cli.{verb.replace('-', '_')}").run
    if "--json" not in arguments:
        run(arguments)
        return
    failure = None
    with contextlib.redirect_stdout(sys.stderr):
        try:
            metrics = run([argument for argument in arguments if argument != "--json"])
        except KeelError as error:
            if error.metrics is None:
                raise
            metrics, failure = error.metrics, error
    from keel.run.json_values import finite

    print(json.dumps(finite(metrics)))
    if failure is not None:
        raise failure


def _verdict(error: BaseException, resumable: bool = False) -> tuple[int, str]:
    """Exit code and the line that says what happened."""
    if isinstance(error, KeelError):
        return error.exit_code, f"error: {error}"
    if isinstance(error, Interrupted) and resumable:
        return error.exit_code, f"interrupted by {error} -> go on with --resume"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, OSError) and error.errno in STORAGE_FAILURES:
        return 5, f"error: {error.filename or 'storage'}: {error.strerror} -> free or repair the storage"
    text = " ".join(str(error).split())
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:  # torch's, of the GPU or the CPU
        return 1, f"error: out of memory: {text[:200]} -> {OUT_OF_MEMORY}"
    if isinstance(error, MemoryError) or os.strerror(errno.ENOMEM).lower() in text.lower():  # of an import also
        return 1, "error: out of memory -> end other programs, or use a machine with more"
    return 1, f"unexpected {type(error).__name__}: {text[:500]}; run again with --debug to see where"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The libraries below have much to say that is no news to the user; --debug lets them."""
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
