"""Read the settings of a verb from a YAML file and the command line, and check them."""

import argparse
import json
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, Generic, NoReturn

import yaml
from pydantic import BaseModel, create_model

from keel.cli.help import GLOBAL_FLAGS, HELP_FLAGS, SettingsT, Verb, brief_help, full_help
from keel.cli.short_forms import SCORERS, add_short_forms, append_scorers, has_short_forms
from keel.config import LISTS_OF_SECTIONS, parse, section_error, setting_names, suggestion
from keel.errors import ConfigError
from keel.files import read_regular

YES_OR_NO = {"true", "false", "yes", "no", "on", "off", "1", "0", "t", "f", "y", "n"}
HELP = {"-h", *(f"--{flag}" for flag in HELP_FLAGS)}


@dataclass(frozen=True)
class Command(Generic[SettingsT]):
    """The checked settings of a verb, and its flags."""

    settings: SettingsT
    resume: bool = False
    check: bool = False
    stats: bool = False


def read_command(verb: Verb[SettingsT], arguments: Sequence[str]) -> Command[SettingsT]:
    """Merge the YAML file with the command line, which takes precedence, and check the result.

    --help and --help-all print the help and raise SystemExit. Raises ConfigError for settings that cannot be used.
    """
    help_flags = HELP & set(map(_kebab, arguments))
    if help_flags:
        print(full_help(verb) if "--help-all" in help_flags else brief_help(verb), end="")
        raise SystemExit(0)
    parser = _Parser(verb)
    from_flags = _read_flags(parser, verb.settings, arguments)
    words, scorers = parser.words, parser.scorers
    is_file = bool(words) and (not verb.positional or (len(words) == 1 and words[0].endswith((".yaml", ".yml"))))
    file = words[0] if is_file else None
    if words and file is None:
        from_flags = {verb.positional: words if verb.takes_several else words[0]} | from_flags
    needs_settings = any(field.is_required() for field in verb.settings.model_fields.values())
    if needs_settings and file is None and not from_flags and not scorers:
        raise ConfigError(
            "no settings given", fix=f"keel {verb.name} {verb.placeholder}, or see keel {verb.name} --help"
        )
    from_file = read_yaml(Path(file)) if file else {}
    where = " and ".join(filter(None, [file, "command line" if from_flags or scorers else ""]))
    checked = parse(verb.settings, append_scorers(merge_settings(from_file, from_flags), scorers), where=where)
    return Command(checked, **{flag: getattr(parser.parsed, flag) for flag in verb.flags})


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping. Raises ConfigError with the line of a mistake."""
    try:
        # utf-8-sig accepts the byte order mark that some editors write.
        content = yaml.load(read_regular(path).decode("utf-8-sig"), Loader=_StrictLoader)
    except OSError as error:
        raise ConfigError(
            f"cannot read the settings: {error.strerror}", where=str(path), fix="check the path and its permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError("the settings are not UTF-8 text", where=str(path), fix="save the file as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"broken YAML: {getattr(error, 'problem', None) or error}", where=place) from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"expected `name: value` lines, got {type(content).__name__}",
            where=str(path),
            fix="write one setting on each line",
        )
    return content


def merge_settings(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two nested mappings. `override` takes precedence setting by setting; lists are replaced, not merged."""
    merged = dict(base)
    for key, value in override.items():
        inner = merged.get(key)
        if isinstance(inner, Mapping) and isinstance(value, Mapping):
            value = merge_settings(inner, value)
        merged[key] = value
    return merged


def _read_flags(parser: "_Parser", settings: type[BaseModel], arguments: Sequence[str]) -> dict[str, Any]:
    """Return the settings of the command line as nested mappings of text: {"algorithm": {"kl_coef": "0.1"}}."""
    # Imported here: it takes longer to import than everything that --help needs.
    from pydantic_settings import BaseSettings, CliSettingsSource, SettingsError

    try:
        source: CliSettingsSource[Any] = CliSettingsSource(
            create_model(settings.__name__, __base__=(settings, BaseSettings)),  # type: ignore[arg-type]
            root_parser=parser,
            parse_args_method=_Parser.parse_args,
            cli_parse_args=_with_explicit_true([_kebab(argument) for argument in arguments], settings),
            cli_parse_none_str="null",
            cli_kebab_case=True,
            cli_avoid_json=True,
            cli_hide_none_type=True,
        )
        return merge_settings(source(), _json_lists(arguments, settings))
    except SettingsError as error:
        raise ConfigError(_explain(str(error), settings), where="command line") from error


def _json_lists(arguments: Sequence[str], settings: type[BaseModel]) -> dict[str, Any]:
    """Parse the lists of texts that are written as JSON.

    pydantic-settings splits such a list at its commas and does not decode escapes such as `\\n`.
    """
    list_names = set(setting_names(settings, kind=list[str]))
    lists: dict[str, Any] = {}
    pairs = [argument.partition("=")[::2] for argument in arguments if "=" in argument]
    for name, value in [*pairs, *pairwise(arguments)]:
        name = name.removeprefix("--").replace("-", "_")
        if name not in list_names or not value.startswith("["):
            continue
        try:
            nested = json.loads(value)
        except ValueError:
            continue
        for key in reversed(name.split(".")):
            nested = {key: nested}
        lists = merge_settings(lists, nested)
    return lists


def _explain(message: str, settings: type[BaseModel]) -> str:
    """Rewrite an error message of pydantic-settings in terms of settings."""
    if unreadable := re.search(r"Parsing error encountered for (\S+):", message):
        name = unreadable[1]
        is_list = name in setting_names(settings, kind=list[str])
        is_json = name.rpartition(".")[2] in LISTS_OF_SECTIONS
        form = "JSON" if is_json else "a,b or a JSON list" if is_list else "name=value,name=value"
        return f"{name}: expected {form}"
    if section := re.match(r'error parsing value for field "(\w+)"', message):
        return section_error(settings, [section[1]])
    return message.partition(" from source")[0]


def _with_explicit_true(arguments: Sequence[str], settings: type[BaseModel]) -> list[str]:
    """Append `=true` to a yes-or-no setting without a value, since pydantic-settings requires one."""
    names = [*setting_names(settings, kind=bool), *setting_names(settings, kind=bool | None)]
    switches = {f"--{name.replace('_', '-')}" for name in names}
    return [
        f"{argument}=true" if argument in switches and following.lower() not in YES_OR_NO else argument
        for argument, following in zip_longest(arguments, arguments[1:], fillvalue="")
    ][: len(arguments)]


def _kebab(argument: str) -> str:
    """Spell a flag with hyphens: `--algorithm.kl_coef` becomes `--algorithm.kl-coef`."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


class _Parser(argparse.ArgumentParser):
    """An argparse parser that raises ConfigError instead of exiting. keel.cli.help writes the help."""

    def __init__(self, verb: Verb[Any]) -> None:
        super().__init__(prog=f"keel {verb.name}", add_help=False, allow_abbrev=False)
        self.command = f"keel {verb.name} [{verb.placeholder}]"
        self.parsed = argparse.Namespace()
        self.words: list[str] = []
        self.scorers: list[dict[str, Any]] = []
        self.add_argument("file", nargs="*" if verb.takes_several else "?")
        for flag in (*verb.flags, *GLOBAL_FLAGS, *HELP_FLAGS):
            self.add_argument(f"--{flag}", action="store_true")
        if has_short_forms(verb.settings):
            add_short_forms(self)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.parsed = super().parse_args(args, namespace)
        # Removed from the namespace, because pydantic-settings takes every entry of it for a setting.
        self.scorers = vars(self.parsed).pop(SCORERS, None) or []
        words = self.parsed.file or []
        # Copied, because pydantic-settings replaces a list in the namespace by its JSON text.
        self.words = list(words) if isinstance(words, list) else [words]
        return self.parsed

    def error(self, message: str) -> NoReturn:
        fix = ""
        if unknown := re.match(r"unrecognized arguments: (--[^\s=]+)", message):
            known = [option for option in self._option_string_actions if option.startswith("--")]
            message = f"unknown setting {unknown[1]}; {suggestion(unknown[1], known)}"
        elif extra := re.match(r"unrecognized arguments: (.+)", message):
            message, fix = f"unexpected arguments: {extra[1]}", f"{self.command} [--setting value ...]"
        elif incomplete := re.match(r"argument (--\S+): expected one argument", message):
            message = f"{incomplete[1]} needs a value"
        raise ConfigError(message, where="command line", fix=fix)


class _StrictLoader(yaml.SafeLoader):
    """Refuse a key that occurs twice in one mapping, where PyYAML silently takes the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} occurs twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)
