"""Chat templates are programs that come with a model. Jinja's sandbox keeps them from the machine; the limits here
keep one that never ends, or fills the memory, from the run."""

import json
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

from keel.data.messages import Messages
from keel.errors import ConfigError, DataError

if sys.platform != "win32":
    import resource

SECONDS = 5  # of processor time: a machine that is busy, or was paused, makes no template a bad one
PAUSES, PAUSE = 60_000, 0.002  # how often and how long the child is waited for, should it hang without working
MEGABYTES = 512
CHARACTERS = 2_000_000
NOW = re.compile(r"""\bstrftime_now\(\s*(['"])(.*?)\1\s*\)""")  # how a template asks for the date


class Template:
    """A tokenizer's chat template. Its first conversation is tried in a child process (on Linux)."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.where, self.tried = tokenizer, tokenizer.name_or_path, sys.platform != "linux"

    def render(self, messages: Messages, add_generation_prompt: bool, tools: Sequence[Any] | None = None) -> str:
        """Return the conversation as text. `tools` are the functions that the model may call, as JSON schemas.

        Raises DataError when the template refuses the messages, ConfigError when it exceeds the limits.
        """
        if not self.tried and not ends_in_time(lambda: [self._text(messages, both, tools) for both in (True, False)]):
            raise ConfigError(
                f"the chat template takes more than {SECONDS} s or {MEGABYTES} MB for one conversation",
                where=self.where,
                fix="repair it, or use another tokenizer",
            )
        self.tried = True
        try:
            text = self._text(messages, add_generation_prompt, tools)
        except ConfigError:  # of the environment, not of the rows
            raise
        except Exception as error:  # a program of somebody else's may raise anything
            raise DataError(f"the chat template refuses these messages: {error}", where=self.where) from error
        if len(text) > CHARACTERS:
            raise ConfigError(f"the chat template makes {len(text):,} characters of one conversation", self.where)
        return text

    def writes_date(self) -> bool:
        """Whether the same conversation reads otherwise on another day."""
        chat: Messages = [{"role": "user", "content": "x"}]
        try:
            self.render(chat, True)
            return self._text(chat, True, None) != self._text(chat, True, None, today() + timedelta(days=40))
        except Exception:  # noqa: BLE001 - it wants other messages, and refuses in its own time what it cannot write
            return False

    def _text(
        self, messages: Messages, add_generation_prompt: bool, tools: Sequence[Any] | None, when: datetime | None = None
    ) -> str:
        given = {"tokenize": False, "add_generation_prompt": add_generation_prompt, "tools": tools}
        source = self.tokenizer.chat_template
        if isinstance(source, str) and NOW.search(source):  # transformers takes no function among its arguments
            date = when or today()
            given["chat_template"] = NOW.sub(lambda call: json.dumps(date.strftime(call[2])), source)
        return str(self.tokenizer.apply_chat_template(messages, **given))


@cache
def today() -> datetime:
    """Return the time that templates write: one for the whole process, since a text that was rendered before midnight
    is compared with one from after it; that of SOURCE_DATE_EPOCH, where it is set. Raises ConfigError."""
    source = os.environ.get("SOURCE_DATE_EPOCH")
    if source is None:
        return datetime.now().astimezone()
    try:
        return datetime.fromtimestamp(int(source), UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise ConfigError(f"{source!r} is no time in seconds since 1970", "SOURCE_DATE_EPOCH", "correct it") from error


@cache
def cached_template(tokenizer: Any, source: str) -> Template:
    """One for each tokenizer and text of a template."""
    return Template(tokenizer)


def ends_in_time(job: Callable[[], object]) -> bool:
    """Whether a job ends within the limits, whatever comes of it: tried in a forked child, which ends with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads; the child uses none
        pid = os.fork()
    if not pid:
        _in_child(job)
    ended = 0
    try:
        for _ in range(PAUSES):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status) == 0
            time.sleep(PAUSE)
    finally:
        if not ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return False


def _in_child(job: Callable[[], object]) -> None:
    code = 1
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + MEGABYTES * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        job()
        code = 0
    except MemoryError:
        pass
    except Exception:  # noqa: BLE001 - it refuses, which is an answer
        code = 0
    finally:
        os._exit(code)
