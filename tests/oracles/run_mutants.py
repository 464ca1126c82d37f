"""Runs selected tests against several copies of keel: `python run_mutants.py JOBS.json`, answers on standard output.

A job is a name, the folder that holds the copy, and pytest's arguments. Every job is a fork, so that the slow imports
happen once; keel itself is imported after the fork, from the job's folder.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch  # noqa: F401
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama  # noqa: F401


def run(folder: str, arguments: list[str], output: Path) -> int:
    """pytest's exit code in a process of its own; 99 if the copy is not what was imported."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    code = 99
    try:
        log = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.path.insert(0, folder)
        code = int(pytest.main(arguments))
        if not Path(sys.modules["keel"].__file__ or "").is_relative_to(folder):
            code = 99
    finally:
        sys.stdout.flush()
        os._exit(code)


def main() -> None:
    results = {}
    for name, (folder, arguments) in json.loads(Path(sys.argv[1]).read_text()).items():
        output = Path(folder) / "output.txt"
        code = run(folder, arguments, output)
        results[name] = (code, output.read_text())
    print(json.dumps(results))


if __name__ == "__main__":
    main()
