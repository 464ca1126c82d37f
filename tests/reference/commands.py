"""docs/reference/commands.md: what each verb does, its main settings, its flags, and the exit codes."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

from keel.cli import main as cli
from keel.cli.help import EXAMPLE, FLAGS, GLOBAL_FLAGS, HELP_FLAGS, Verb, list_sections
from keel.cli.short_forms import SHORT_FORMS, has_short_forms
from keel.config import setting_names

from .markdown import anchor, escape, table
from .settings import row

INTRODUCTION = """
# Commands

```
keel VERB [RUN.yaml] [--setting value ...] [--debug] [--json]
```

Settings come from a YAML file, from flags, or from both; flags override the file. `keel VERB --help` shows the main
settings of a verb, `keel VERB --help-all` every setting. [All settings](settings.md) has them in one page,
[Settings and their defaults](../config.md) explains each default.
"""


def verbs() -> Iterator[Verb[Any]]:
    """Yield the verbs in the order of `keel --help`."""
    for name in cli.VERBS:
        yield import_module(f"keel.cli.{name.replace('-', '_')}").VERB


def page() -> str:
    """Return the text of the page."""
    summaries = zip(verbs(), cli.VERBS.values(), strict=True)
    rows = [[f"[`keel {verb.name}`](#{anchor(f'keel {verb.name}')})", escape(text)] for verb, text in summaries]
    flags = [[f"`--{name}`", escape(text)] for name, text in (GLOBAL_FLAGS | HELP_FLAGS).items()]
    codes = [[str(code), escape(text)] for code, text in cli.EXIT_CODES.items()]
    parts = [
        INTRODUCTION.strip(),
        table(["command", "what it does"], rows),
        "## Flags of every command",
        table(["flag", "what it does"], flags),
        "## Exit codes",
        table(["code", "meaning"], codes),
        "What to do about each is in [troubleshooting](../troubleshooting.md#exit-codes).",
    ]
    return "\n\n".join([*parts, *map(verb_section, verbs())])


def verb_section(verb: Verb[Any]) -> str:
    """Return the description, the example and the main settings of a verb."""
    paragraphs = verb.about.strip().split("\n\n")
    text = [escape(" ".join(paragraph.split())) for paragraph in paragraphs if not paragraph.startswith(EXAMPLE)]
    [example] = [paragraph for paragraph in paragraphs if paragraph.startswith(EXAMPLE)]
    code = "\n".join(line.removeprefix("  ") for line in example.splitlines()[1:])
    return "\n\n".join([f"## keel {verb.name}", *text, f"```\n{code}\n```", *settings_table(verb)])


def settings_table(verb: Verb[Any]) -> Iterator[str]:
    """Yield the table of main settings and flags, and a link to all settings."""
    fields = {
        name: (field, section.optional)
        for section in list_sections(verb.settings)
        for name, field in section.fields.items()
    }
    every = list(setting_names(verb.settings))
    main = verb.settings.main_settings or every
    rows = [row(verb.settings, name, *fields[name]) for name in main]
    rows += [[f"`--{flag}`", "flag", "", escape(FLAGS[flag])] for flag in verb.flags]
    if has_short_forms(verb.settings):
        rows += [[f"`--{form.flag}`", f"`{form.metavar}`", "", escape(form.help)] for form in SHORT_FORMS]
    yield table(["setting", "type", "default", "meaning"], rows)
    if len(every) > len(main):
        yield f"[All {len(every)} settings](settings.md#{anchor(f'keel {verb.name}')})"
