"""From a YAML file and the command line to checked settings, and from a settings class to its help text."""

import argparse
import json
import re
import shutil
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, create_model
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsError

from keel.config import nearest, not_a_section, parse, setting_names
from keel.errors import ConfigError
from keel.files import read_regular

SettingsT = TypeVar("SettingsT", bound=BaseModel)

FLAGS = {
    "resume": "go on from the newest intact checkpoint in output",
    "check": "only load everything and run the self-check",
    "stats": "print progress, agreement and each rater's figures, and end",
}
YES_OR_NO = {"true", "false", "yes", "no", "on", "off", "1", "0", "t", "f", "y", "n"}
# Read by `main` before a verb sees them; here for --help and for the nearest-name hint.
GLOBAL_FLAGS = {"json": "print the figures as one JSON object, progress to standard error", "debug": "show tracebacks"}


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
    parser = _Parser(verb, settings, about, first)
    what = f"the setting `{plain}`, or a file of settings" if plain else "settings"
    many = "*" if several else "?"
    parser.add_argument("file", nargs=many, metavar=first, help=f"{what}; the command line has the last word")
    for flag, text in ({name: FLAGS[name] for name in flags} | GLOBAL_FLAGS).items():
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    given = _command_line(parser, settings, arguments)
    options, named = parser.parsed, parser.words
    file = named[0] if named and (not plain or (len(named) == 1 and named[0].endswith((".yaml", ".yml")))) else None
    if named and file is None:
        given = {plain: named if several else named[0]} | given
    required = any(field.is_required() for field in settings.model_fields.values())
    if required and file is None and not given:
        raise ConfigError("no settings given", fix=f"keel {verb} {first}, or see keel {verb} --help")
    from_file = read_yaml(Path(file)) if file else {}
    where = " and ".join(filter(None, [file, "command line" if given else ""]))
    checked = parse(settings, merge_settings(from_file, given), where=where)
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
    """argparse that raises instead of exiting, and whose help is kept short."""

    def __init__(self, verb: str, settings: type[BaseModel], about: str, first: str) -> None:
        width = min(120, shutil.get_terminal_size().columns)
        super().__init__(
            prog=f"keel {verb}",
            usage=f"keel {verb} [{first}] [--setting value ...]",
            description=about,
            epilog=_list_help(settings),
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=38, width=width),
            allow_abbrev=False,
        )
        self.parsed = argparse.Namespace()
        self.words: list[str] = []

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.parsed = super().parse_args(args, namespace)
        words = self.parsed.file or []
        self.words = list(words) if isinstance(words, list) else [words]  # the library writes a list as JSON
        return self.parsed

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        if unknown:
            known = [option for option in self._option_string_actions if option.startswith("--")]
            message = f"unknown setting {unknown[1]}; {nearest(unknown[1], known)}"
        raise ConfigError(message, where="command line")

    def format_help(self) -> str:
        # Defaults of null are told in the text of the setting; "ifdef" is the library's word for a section that may be
        # left out, whose settings are required only where it is given.
        text = re.sub(r"\s*\((?:default:\s+(?:None|null)|ifdef:\s+required)\)", "", super().format_help())
        return re.sub(r" options:\n(  default:[^\n]*\(undefined\)\s?)?", ":\n", text)


def _list_help(settings: type[BaseModel]) -> str:
    """Help for settings that are lists of sections, which argparse shows as JSON only."""
    lines = []
    for name, field in settings.model_fields.items():
        for inner in get_args(field.annotation):
            if isinstance(inner, type) and issubclass(inner, BaseModel) and field.annotation == list[inner]:  # type: ignore[valid-type]
                lines.append(f"each of {name}:")
                lines += [f"  {key:<18}{value.description}" for key, value in inner.model_fields.items()]
    return "\n".join(lines)


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one section; plain YAML lets the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands here twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)
