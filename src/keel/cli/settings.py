"""From a YAML file and the command line to checked settings."""

import argparse
import json
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar, get_origin

import yaml
from pydantic import BaseModel, create_model

from keel.cli.help import GLOBAL_FLAGS, HELP_FLAGS, VerbHelp, brief_help, full_help
from keel.cli.short_forms import SCORERS, add_short_forms, append_scorers, has_short_forms
from keel.config import nearest, not_a_section, parse, setting_names
from keel.errors import ConfigError
from keel.files import read_regular

SettingsT = TypeVar("SettingsT", bound=BaseModel)

YES_OR_NO = {"true", "false", "yes", "no", "on", "off", "1", "0", "t", "f", "y", "n"}
HELP = {"-h", *(f"--{flag}" for flag in HELP_FLAGS)}


@dataclass(frozen=True)
class Command(Generic[SettingsT]):
    """What a person asked a verb to do."""

    settings: SettingsT
    resume: bool = False
    check: bool = False
    stats: bool = False


def read_command(
    verb: str,
    settings: type[SettingsT],
    arguments: Sequence[str],
    about: str,
    flags: Sequence[str] = (),
    plain: str = "",
) -> Command[SettingsT]:
    """Merge the YAML file with the command line, which wins; check the result. Raises ConfigError; --help exits 0.

    `plain` is the setting that an argument means which is neither an option nor a YAML file; of a list, several.
    """
    several = bool(plain) and get_origin(settings.model_fields[plain].annotation) is list
    first = f"{plain.upper()}{' ...' if several else ''} | RUN.yaml" if plain else "RUN.yaml"
    what = f"The setting `{plain}`, or a YAML file of settings" if plain else "YAML file of settings"
    verb_help = VerbHelp(verb, settings, about, first, f"{what}; flags override the file", flags)
    asked = HELP & set(map(_kebab, arguments))
    if asked:
        print(full_help(verb_help) if "--help-all" in asked else brief_help(verb_help), end="")
        raise SystemExit(0)
    parser = _Parser(verb_help, many=several)
    given = _command_line(parser, settings, arguments)
    options, named, scorers = parser.parsed, parser.words, parser.scorers
    file = named[0] if named and (not plain or (len(named) == 1 and named[0].endswith((".yaml", ".yml")))) else None
    if named and file is None:
        given = {plain: named if several else named[0]} | given
    required = any(field.is_required() for field in settings.model_fields.values())
    if required and file is None and not given and not scorers:
        raise ConfigError("no settings given", fix=f"keel {verb} {first}, or see keel {verb} --help")
    from_file = read_yaml(Path(file)) if file else {}
    where = " and ".join(filter(None, [file, "command line" if given or scorers else ""]))
    checked = parse(settings, append_scorers(merge_settings(from_file, given), scorers), where=where)
    return Command(checked, **{flag: getattr(options, flag) for flag in flags})


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError naming the line of a mistake."""
    try:
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
            fix="write one setting a line",
        )
    return content


def merge_settings(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` wins, section by section; a list is replaced whole."""
    result = dict(below)
    for key, value in above.items():
        inner = result.get(key)
        result[key] = (
            merge_settings(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
        )
    return result


def _command_line(parser: "_Parser", settings: type[BaseModel], arguments: Sequence[str]) -> dict[str, Any]:
    """What was given, as nested mappings of text: {"algorithm": {"kl_coef": "0.1"}}."""
    # Imported here, since it takes longer than all else that --help needs.
    from pydantic_settings import BaseSettings, CliSettingsSource, SettingsError

    try:
        source: CliSettingsSource[Any] = CliSettingsSource(
            create_model(settings.__name__, __base__=(settings, BaseSettings)),  # type: ignore[arg-type]
            root_parser=parser,
            parse_args_method=_Parser.parse_args,
            cli_parse_args=_spelled_out([_kebab(argument) for argument in arguments], settings),
            cli_parse_none_str="null",
            cli_kebab_case=True,
            cli_avoid_json=True,
            cli_hide_none_type=True,
        )
        return merge_settings(source(), _json_lists(arguments, settings))
    except SettingsError as error:
        raise ConfigError(_misread(str(error), settings), where="command line") from error


def _json_lists(arguments: Sequence[str], settings: type[BaseModel]) -> dict[str, Any]:
    """Lists of texts that were given as JSON: the library splits them, and leaves `\\n` and its like as they stand."""
    known = set(setting_names(settings, kind=list[str]))
    found: dict[str, Any] = {}
    pairs = [argument.partition("=")[::2] for argument in arguments if "=" in argument]
    for name, value in [*pairs, *pairwise(arguments)]:
        name = name.removeprefix("--").replace("-", "_")
        if name not in known or not value.startswith("["):
            continue
        try:
            texts = json.loads(value)
        except ValueError:
            continue
        for part in reversed(name.split(".")):
            texts = {part: texts}
        found = merge_settings(found, texts)
    return found


def _misread(complaint: str, settings: type[BaseModel]) -> str:
    if pairs := re.search(r"Parsing error encountered for (\S+):", complaint):
        return f"{pairs[1]}: expected name=value,name=value"
    if section := re.match(r'error parsing value for field "(\w+)"', complaint):
        return not_a_section(settings, [section[1]])
    return complaint.partition(" from source")[0]


def _spelled_out(arguments: Sequence[str], settings: type[BaseModel]) -> list[str]:
    """A yes-or-no setting that stands alone means yes."""
    names = [*setting_names(settings, kind=bool), *setting_names(settings, kind=bool | None)]
    switches = {f"--{name.replace('_', '-')}" for name in names}
    return [
        f"{argument}=true" if argument in switches and following.lower() not in YES_OR_NO else argument
        for argument, following in zip_longest(arguments, arguments[1:], fillvalue="")
    ][: len(arguments)]


def _kebab(argument: str) -> str:
    """`--algorithm.kl_coef` is as good as `--algorithm.kl-coef`."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


class _Parser(argparse.ArgumentParser):
    """argparse that raises instead of exiting; its help is written by keel.cli.help."""

    def __init__(self, verb: VerbHelp, many: bool) -> None:
        super().__init__(prog=f"keel {verb.name}", add_help=False, allow_abbrev=False)
        self.parsed = argparse.Namespace()
        self.words: list[str] = []
        self.scorers: list[dict[str, Any]] = []
        self.add_argument("file", nargs="*" if many else "?")
        for flag in (*verb.flags, *GLOBAL_FLAGS, *HELP_FLAGS):
            self.add_argument(f"--{flag}", action="store_true")
        if has_short_forms(verb.settings):
            add_short_forms(self)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.parsed = super().parse_args(args, namespace)
        # Taken out of what the library reads, which knows settings only.
        self.scorers = vars(self.parsed).pop(SCORERS, None) or []
        words = self.parsed.file or []
        self.words = list(words) if isinstance(words, list) else [words]  # the library writes a list as JSON
        return self.parsed

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        if unknown:
            known = [option for option in self._option_string_actions if option.startswith("--")]
            message = f"unknown setting {unknown[1]}; {nearest(unknown[1], known)}"
        raise ConfigError(message, where="command line")


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one section; plain YAML lets the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands here twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)
