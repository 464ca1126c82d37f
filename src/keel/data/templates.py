"""Chat templates are programs that come with a model. Jinja's sandbox keeps them from the machine; the limits here
keep one that never ends, or fills the memory, from the run."""

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError  # a dependency of transformers' chat templates

from keel.errors import ConfigError, DataError

if sys.platform != "win32":
    import resource

SECONDS = 5.0
MEGABYTES = 512
CHARACTERS = 2_000_000


class Template:
    """A tokenizer's chat template. Its first conversation is tried in a child process (on Linux)."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.where, self.tried = tokenizer, tokenizer.name_or_path, sys.platform != "linux"

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """Raises DataError when the template refuses the messages, ConfigError when it exceeds the limits."""
        given = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        if not self.tried and not ends_in_time(lambda: self.tokenizer.apply_chat_template(messages, **given)):
            raise ConfigError(
                f"the chat template takes more than {SECONDS:g} s or {MEGABYTES} MB for one conversation",
                where=self.where,
                fix="repair it, or use another tokenizer",
            )
        self.tried = True
        try:
            text = str(self.tokenizer.apply_chat_template(messages, **given))
        except TemplateError as error:
            raise DataError(f"the chat template refuses these messages: {error}", where=self.where) from error
        if len(text) > CHARACTERS:
            raise ConfigError(f"the chat template makes {len(text):,} characters of one conversation", self.where)
        return text


@cache
def template_of(tokenizer: Any, source: str) -> Template:
    """One for each tokenizer and text of a template."""
    return Template(tokenizer)


def ends_in_time(job: Callable[[], object]) -> bool:
    """Whether a job ends within the limits, whatever comes of it: tried in a forked child, which ends with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads; the child uses none
        pid = os.fork()
    if not pid:
        _in_child(job)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def _in_child(job: Callable[[], object]) -> None:
    code = 1
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + MEGABYTES * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        job()
        code = 0
    except TemplateError:
        code = 0  # it refuses: that is an answer
    finally:
        os._exit(code)
