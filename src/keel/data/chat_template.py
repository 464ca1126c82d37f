"""Render chat templates within limits of time, memory and length.

A chat template is a program that comes with a model. Jinja's sandbox protects the machine from it. The limits here
protect the run from a template that never ends or fills the memory.
"""

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

SECONDS = 5  # of processor time, not of the clock: a busy or suspended machine must not fail a good template
POLLS, POLL_SECONDS = 60_000, 0.002  # two minutes for a child that hangs and uses no processor time
MEGABYTES = 512
CHARACTERS = 2_000_000  # of one rendered conversation
DATE_CALL = re.compile(r"""\bstrftime_now\(\s*(['"])(.*?)\1\s*\)""")  # a template's call for the date


class Template:
    """A tokenizer's chat template. On Linux, a child process renders the first conversation as a test."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.where = tokenizer, tokenizer.name_or_path
        self.tested = sys.platform != "linux"

    def render(self, messages: Messages, add_generation_prompt: bool, tools: Sequence[Any] | None = None) -> str:
        """Return the conversation as text.

        Args:
            tools: functions that the model may call, as JSON schemas.

        Raises DataError if the template refuses the messages, ConfigError if it exceeds the limits.
        """
        if not self.tested and not runs_within_limits(
            lambda: [self._text(messages, prompted, tools) for prompted in (True, False)]
        ):
            raise ConfigError(
                f"the chat template takes more than {SECONDS} s or {MEGABYTES} MB for one conversation",
                where=self.where,
                fix="repair it, or use another tokenizer",
            )
        self.tested = True
        try:
            text = self._text(messages, add_generation_prompt, tools)
        except ConfigError:  # of SOURCE_DATE_EPOCH, not of these messages
            raise
        except Exception as error:  # a template may raise anything
            raise DataError(f"the chat template refuses these messages: {error}", where=self.where) from error
        if len(text) > CHARACTERS:
            raise ConfigError(f"the chat template writes {len(text):,} characters for one conversation", self.where)
        return text

    def writes_date(self) -> bool:
        """Whether the template writes the date: the same conversation differs on another day."""
        chat: Messages = [{"role": "user", "content": "x"}]
        try:
            self.render(chat, True)
            return self._text(chat, True, None) != self._text(chat, True, None, today() + timedelta(days=40))
        except Exception:  # noqa: BLE001 - the template needs other messages; render() reports it for real ones
            return False

    def _text(
        self, messages: Messages, add_generation_prompt: bool, tools: Sequence[Any] | None, when: datetime | None = None
    ) -> str:
        options = {"tokenize": False, "add_generation_prompt": add_generation_prompt, "tools": tools}
        source = self.tokenizer.chat_template
        if isinstance(source, str) and DATE_CALL.search(source):
            # apply_chat_template accepts no replacement for strftime_now, so write the date into the source.
            date = when or today()
            options["chat_template"] = DATE_CALL.sub(lambda call: json.dumps(date.strftime(call[2])), source)
        return str(self.tokenizer.apply_chat_template(messages, **options))


@cache
def today() -> datetime:
    """Return the time that templates write: that of SOURCE_DATE_EPOCH if set, else of the first call.

    It is fixed for the process, because texts from before and after midnight are compared token by token.
    Raises ConfigError for an invalid SOURCE_DATE_EPOCH.
    """
    source = os.environ.get("SOURCE_DATE_EPOCH")
    if source is None:
        return datetime.now().astimezone()
    try:
        return datetime.fromtimestamp(int(source), UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise ConfigError(
            f"{source!r} is not a time in seconds since 1970", "SOURCE_DATE_EPOCH", "give an integer"
        ) from error


@cache
def cached_template(tokenizer: Any, source: str) -> Template:
    """Return one Template for each tokenizer and source, so that each is tested once."""
    return Template(tokenizer)


def runs_within_limits(job: Callable[[], object]) -> bool:
    """Whether a job ends within the limits, with or without an error. It runs in a forked child."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about forks beside threads; the child uses no threads
        pid = os.fork()
    if not pid:
        _run_in_child(job)
    ended = 0
    try:
        for _ in range(POLLS):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status) == 0
            time.sleep(POLL_SECONDS)
    finally:
        if not ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return False


def _run_in_child(job: Callable[[], object]) -> None:
    code = 1
    try:
        # RLIMIT_AS limits all mapped memory, so add to what the parent has mapped already.
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + MEGABYTES * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        job()
        code = 0
    except MemoryError:
        pass
    except Exception:  # noqa: BLE001 - a refusal is within the limits
        code = 0
    finally:
        os._exit(code)
