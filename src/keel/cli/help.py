"""Write the help of a verb from its config class: the main settings, or every setting with --help-all."""

import argparse
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from keel.cli.short_forms import SHORT_FORMS, has_short_forms
from keel.config import LISTS_OF_SECTIONS, section_class, setting_names

SettingsT = TypeVar("SettingsT", bound=BaseModel)

FLAGS = {
    "resume": "Continue from the newest intact checkpoint of the run folder",
    "check": "Load everything, run the self-check, and exit",
    "stats": "Print progress, agreement and metrics of each rater, and exit",
}
# `main` removes these before a verb reads its arguments. --help and the hint with the nearest name need them.
GLOBAL_FLAGS = {
    "json": "Print the metrics as one JSON object, and progress to standard error",
    "debug": "Show tracebacks",
}
HELP_FLAGS = {"help": "Show the main settings and exit", "help-all": "Show all settings and exit"}
MAX_WIDTH = 120
EXAMPLE = "example:"


@dataclass(frozen=True)
class Verb(Generic[SettingsT]):
    """A verb of the command line: its settings, its help text and the arguments it takes."""

    name: str
    settings: type[SettingsT]
    about: str = ""
    """a sentence, then further paragraphs, the last of which begins with `example:`"""
    flags: Sequence[str] = ()
    """keys of `FLAGS`"""
    positional: str = ""
    """the setting that an argument without a flag sets, unless the argument is a YAML file; empty for none"""

    @property
    def takes_several(self) -> bool:
        """Whether the positional setting is a list, so that several arguments are allowed."""
        return bool(self.positional) and get_origin(self.settings.model_fields[self.positional].annotation) is list

    @property
    def placeholder(self) -> str:
        """Placeholder of the positional arguments, such as `RUNS ... | RUN.yaml`."""
        if not self.positional:
            return "RUN.yaml"
        return f"{self.positional.upper()}{' ...' if self.takes_several else ''} | RUN.yaml"

    @property
    def positional_help(self) -> str:
        """Help text of the positional arguments."""
        setting = f"The setting `{self.positional}`, or a " if self.positional else ""
        return f"{setting}YAML file of settings; flags override the file"


@dataclass(frozen=True)
class SettingsSection:
    """The settings of one config class, without those of its sections."""

    name: str
    """dotted; empty for the settings of the verb itself"""
    about: str
    optional: bool
    """whether the section may be left out; what is required in it is then required only with the section"""
    fields: dict[str, FieldInfo]
    """by dotted name"""


def brief_help(verb: Verb[Any]) -> str:
    """Write the text of --help: what the verb does, an example, and the main settings."""
    first, *_ = paragraphs = verb.about.strip().split("\n\n")
    page = _Page(verb, [first, *(text for text in paragraphs[1:] if text.startswith(EXAMPLE))])
    names = getattr(verb.settings, "main_settings", ())
    if names:
        fields = {
            name: (field, section.optional)
            for section in list_sections(verb.settings)
            for name, field in section.fields.items()
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


def full_help(verb: Verb[Any]) -> str:
    """Write the text of --help-all: the full description, and every setting."""
    page = _Page(verb, verb.about.strip().split("\n\n"))
    page.add_options()
    page.add_sections()
    page.add_scorer_keys()
    return page.parser.format_help()


class _Page:
    """Lay out a help text with argparse, which parses nothing here."""

    def __init__(self, verb: Verb[Any], about: Sequence[str]) -> None:
        self.verb = verb
        self.width = max(40, min(MAX_WIDTH, shutil.get_terminal_size().columns))
        self.parser = argparse.ArgumentParser(
            prog=f"keel {verb.name}",
            usage=f"keel {verb.name} [{verb.placeholder}] [--setting value ...]",
            description="\n\n".join(self._fill(text) for text in about),
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                prog, max_help_position=38, width=self.width
            ),
            add_help=False,
        )

    def _fill(self, text: str, indent: int = 0) -> str:
        return text if text.startswith(EXAMPLE) else textwrap.fill(text, self.width - indent, break_on_hyphens=False)

    def add_options(self) -> None:
        """Add the positional argument, and the flags that are not settings."""
        group = self.parser.add_argument_group("options")
        group.add_argument("file", metavar=self.verb.placeholder, help=self.verb.positional_help)
        flags = {name: FLAGS[name] for name in self.verb.flags} | GLOBAL_FLAGS | HELP_FLAGS
        for flag, text in flags.items():
            names = ["-h", "--help"] if flag == "help" else [f"--{flag}"]
            group.add_argument(*names, action="store_true", help=text)

    def add_setting(self, group: Any, name: str, field: FieldInfo, optional: bool) -> None:
        """Add a setting as a flag. The short forms of `rewards` follow it."""
        _add(group, f"--{name.replace('_', '-')}", type_name(field.annotation), describe_setting(field, optional))
        if name == "rewards" and has_short_forms(self.verb.settings):
            for form in SHORT_FORMS:
                _add(group, f"--{form.flag}", form.metavar, form.help)

    def add_sections(self) -> None:
        """Add every setting, under the name of its section."""
        for section in list_sections(self.verb.settings):
            about = self._fill(section.about, indent=2)
            group = self.parser.add_argument_group(section.name or "settings", about or None)
            for name, field in section.fields.items():
                self.add_setting(group, name, field, section.optional)

    def add_scorer_keys(self) -> None:
        """Add the keys of an entry of `rewards`, which have no flags."""
        field = self.verb.settings.model_fields.get("rewards")
        scorer = section_class(field.annotation) if field is not None else None
        if scorer is not None:
            group = self.parser.add_argument_group("each entry of rewards")
            for name, inner in scorer.model_fields.items():
                group.add_argument(f"rewards.{name}", metavar=name, help=describe_setting(inner).replace("%", "%%"))


def _add(group: Any, flag: str, metavar: str, text: str) -> None:
    # argparse formats help texts with `%`.
    group.add_argument(flag, metavar=metavar, help=text.replace("%", "%%"))


def list_sections(
    settings: type[BaseModel], name: str = "", about: str = "", optional: bool = False
) -> Iterator[SettingsSection]:
    """Yield the settings of a config class, then those of each of its sections, depth first."""
    prefix = f"{name}." if name else ""
    sections = {
        key: section_class(field.annotation)
        for key, field in settings.model_fields.items()
        if key not in LISTS_OF_SECTIONS
    }
    fields = {prefix + key: field for key, field in settings.model_fields.items() if sections.get(key) is None}
    # Required settings come first, although inherited fields precede them in the class.
    fields = dict(sorted(fields.items(), key=lambda item: not item[1].is_required()))
    yield SettingsSection(name, about, optional, fields)
    for key, section in sections.items():
        if section is not None:
            field = settings.model_fields[key]
            yield from list_sections(
                section, prefix + key, field.description or "", optional=optional or field.default is None
            )


def describe_setting(field: FieldInfo, optional: bool = False) -> str:
    """Return the help text of a setting, followed by its default."""
    default = default_text(field, optional)
    if default and not field.is_required():
        default = f"default: {default}"
    return f"{field.description or ''}{f' ({default})' if default else ''}"


def default_text(field: FieldInfo, optional: bool = False) -> str:
    """Return the default of a setting, or `required`. A default of null or nothing is explained by the help text."""
    if field.is_required():
        return "" if optional else "required"
    default = field.default
    if default is None or default in ([], {}):
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    return ",".join(default) if isinstance(default, list) else str(default)


def type_name(annotation: Any) -> str:
    """Return the placeholder of a value: `int`, `{ppo,a2c}`, `list[str]`, `JSON`."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(inner[0])
    if origin is Literal:
        return f"{{{','.join(map(str, inner))}}}" if len(inner) > 1 else str(inner[0])
    if origin in (Union, UnionType):
        names = [type_name(option) for option in inner if option is not type(None)]
        return "|".join(names)
    if origin is list:
        return "JSON" if section_class(annotation) else f"list[{type_name(inner[0])}]"
    if origin is dict:
        return "name=value,..."
    return str(getattr(annotation, "__name__", annotation))
