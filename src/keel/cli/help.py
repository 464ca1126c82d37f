"""Help of a verb, written from its class of settings: the main settings, or with --help-all every setting."""

import argparse
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from keel.cli.short_forms import SHORT_FORMS, has_short_forms
from keel.config import section_class, setting_names

FLAGS = {
    "resume": "Continue from the newest intact checkpoint of the run folder",
    "check": "Only load everything and run the self-check",
    "stats": "Print progress, agreement and metrics of each rater, and exit",
}
# `main` reads these before a verb sees them; here for --help and for the hint with the nearest name.
GLOBAL_FLAGS = {
    "json": "Print the metrics as one JSON object, and progress to standard error",
    "debug": "Show tracebacks",
}
HELP_FLAGS = {"help": "Show the main settings and exit", "help-all": "Show all settings and exit"}
MAX_WIDTH = 120
EXAMPLE = "example:"


@dataclass(frozen=True)
class VerbHelp:
    """What the help and the errors of a verb need to know about it."""

    name: str
    settings: type[BaseModel]
    about: str = ""  # a sentence, further paragraphs, and one that begins with `example:`
    files: str = "RUN.yaml"  # placeholder of what is given without a flag
    files_help: str = ""
    flags: Sequence[str] = ()


@dataclass(frozen=True)
class SettingsSection:
    """The plain settings of one class of settings."""

    name: str  # dotted; empty for those of the verb
    about: str
    optional: bool  # what is required in it is required only where the section is given
    fields: dict[str, FieldInfo]  # by dotted name


def brief_help(verb: VerbHelp) -> str:
    """What the verb does, in a sentence, an example, and the settings that matter."""
    first, *_ = paragraphs = verb.about.strip().split("\n\n")
    page = _Page(verb, [first, *(part for part in paragraphs[1:] if part.startswith(EXAMPLE))])
    names = getattr(verb.settings, "main_settings", ())
    if names:
        fields = {
            name: (field, part.optional) for part in list_sections(verb.settings) for name, field in part.fields.items()
        }
        group = page.parser.add_argument_group("main settings")
        for name in names:
            page.add_setting(group, name, *fields[name])
        count = len(list(setting_names(verb.settings)))
        page.parser.epilog = f"keel {verb.name} --help-all shows all {count} settings."
    else:
        page.add_sections()
        page.parser.epilog = f"keel {verb.name} --help-all describes the verb in full."
    page.add_options()
    return page.parser.format_help()


def full_help(verb: VerbHelp) -> str:
    """Everything about the verb, with every setting."""
    page = _Page(verb, verb.about.strip().split("\n\n"))
    page.add_options()
    page.add_sections()
    page.add_scorer_keys()
    return page.parser.format_help()


class _Page:
    """A parser that parses nothing: argparse only lays out the text."""

    def __init__(self, verb: VerbHelp, about: Sequence[str]) -> None:
        self.verb = verb
        self.width = max(40, min(MAX_WIDTH, shutil.get_terminal_size().columns))
        self.parser = argparse.ArgumentParser(
            prog=f"keel {verb.name}",
            usage=f"keel {verb.name} [{verb.files}] [--setting value ...]",
            description="\n\n".join(self._fill(text) for text in about),
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                prog, max_help_position=38, width=self.width
            ),
            add_help=False,
        )

    def _fill(self, text: str, indent: int = 0) -> str:
        return text if text.startswith(EXAMPLE) else textwrap.fill(text, self.width - indent, break_on_hyphens=False)

    def add_options(self) -> None:
        """What is given without a flag, and the flags that are no settings."""
        group = self.parser.add_argument_group("options")
        group.add_argument("file", metavar=self.verb.files, help=self.verb.files_help)
        flags = {name: FLAGS[name] for name in self.verb.flags} | GLOBAL_FLAGS | HELP_FLAGS
        for flag, text in flags.items():
            names = ["-h", "--help"] if flag == "help" else [f"--{flag}"]
            group.add_argument(*names, action="store_true", help=text)

    def add_setting(self, group: Any, name: str, field: FieldInfo, optional: bool) -> None:
        """One setting as a flag; after `rewards` also the short forms of it."""
        _add(group, f"--{name.replace('_', '-')}", type_name(field.annotation), describe_setting(field, optional))
        if name == "rewards" and has_short_forms(self.verb.settings):
            for form in SHORT_FORMS:
                _add(group, f"--{form.flag}", form.metavar, form.help)

    def add_sections(self) -> None:
        """Every setting, under the name of its section."""
        for section in list_sections(self.verb.settings):
            about = self._fill(section.about, indent=2)
            group = self.parser.add_argument_group(section.name or "settings", about or None)
            for name, field in section.fields.items():
                self.add_setting(group, name, field, section.optional)

    def add_scorer_keys(self) -> None:
        """The settings of each entry of `rewards`, which have no flags."""
        field = self.verb.settings.model_fields.get("rewards")
        scorer = section_class(field.annotation) if field is not None else None
        if scorer is not None:
            group = self.parser.add_argument_group("each of rewards")
            for name, inner in scorer.model_fields.items():
                group.add_argument(f"rewards.{name}", metavar=name, help=describe_setting(inner).replace("%", "%%"))


def _add(group: Any, flag: str, metavar: str, text: str) -> None:
    group.add_argument(flag, metavar=metavar, help=text.replace("%", "%%"))


def list_sections(
    settings: type[BaseModel], name: str = "", about: str = "", optional: bool = False
) -> Iterator[SettingsSection]:
    """The settings of a verb, then those of each section and of the sections in it."""
    prefix = f"{name}." if name else ""
    inner = {key: section_class(field.annotation) for key, field in settings.model_fields.items() if key != "rewards"}
    plain = {prefix + key: field for key, field in settings.model_fields.items() if inner.get(key) is None}
    # What must be given comes first, also where inherited settings precede it.
    plain = dict(sorted(plain.items(), key=lambda item: not item[1].is_required()))
    yield SettingsSection(name, about, optional, plain)
    for key, section in inner.items():
        if section is not None:
            field = settings.model_fields[key]
            may_be_left_out = optional or field.default is None
            yield from list_sections(section, prefix + key, field.description or "", may_be_left_out)


def describe_setting(field: FieldInfo, optional: bool = False) -> str:
    """Help text of a setting with its default. An empty default, such as null, is explained in the text."""
    default = field.default
    if field.is_required():
        note = "" if optional else "required"
    elif default is None or default in ([], {}):
        note = ""
    elif isinstance(default, bool):
        note = f"default: {str(default).lower()}"
    else:
        note = f"default: {','.join(default) if isinstance(default, list) else default}"
    return f"{field.description or ''}{f' ({note})' if note else ''}"


def type_name(annotation: Any) -> str:
    """What to write for a value: `int`, `{ppo,a2c}`, `list[str]`, `JSON`."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(inner[0])
    if origin is Literal:
        return f"{{{','.join(map(str, inner))}}}" if len(inner) > 1 else str(inner[0])
    if origin in (Union, UnionType):
        names = [type_name(part) for part in inner if part is not type(None)]
        return "|".join(names)
    if origin is list:
        return "JSON" if section_class(annotation) else f"list[{type_name(inner[0])}]"
    if origin is dict:
        return "name=value,..."
    return str(getattr(annotation, "__name__", annotation))
