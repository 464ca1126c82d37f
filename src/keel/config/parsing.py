"""Parse settings from a plain mapping: a YAML file merged with the command line."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from keel.errors import ConfigError

SettingsT = TypeVar("SettingsT", bound=BaseModel)


def parse(settings: type[SettingsT], data: Mapping[str, Any], where: str = "settings") -> SettingsT:
    """Parse a mapping into settings.

    Raises ConfigError of one line for the first error, with the nearest known name for an unknown one.
    """
    try:
        return settings.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, settings), where=where) from None


LISTS_OF_SECTIONS = ("rewards", "others")
"""Lists of scorers and of files: each list is one setting, written as JSON on the command line."""


def setting_names(settings: type[BaseModel], prefix: str = "", kind: Any = object) -> Iterator[str]:
    """Yield the dotted names of all settings, e.g. `algorithm.kl_coef`; with `kind` only those of that type."""
    for name, field in settings.model_fields.items():
        inner = section_class(field.annotation)
        if inner is None or name in LISTS_OF_SECTIONS:
            if kind in (object, field.annotation):
                yield prefix + name
        else:
            yield from setting_names(inner, f"{prefix}{name}.", kind)


def section_class(annotation: Any) -> type[BaseModel] | None:
    """Return the settings class inside an annotation such as `list[X] | None`; None for a plain value."""
    return next((each for each in _plain_classes(annotation) if issubclass(each, BaseModel)), None)


def suggestion(name: str, known: list[str]) -> str:
    """Return a hint such as `did you mean kl_coef?`, or the list of known names if none is similar."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {match[0]}?" if match else f"known: {', '.join(known)}"


def _explain(error: ValidationError, settings: type[BaseModel]) -> str:
    # A misspelt name also causes a "missing" error; report the cause.
    first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    path = [str(part) for part in first["loc"]]
    name = ".".join(path)
    if first["type"] == "extra_forbidden":
        section = _section_at(settings, path[:-1])
        return f"unknown setting {name}; {suggestion(path[-1], list(section.model_fields))}"
    if first["type"] == "missing":
        return f"setting {name} is missing"
    if first["type"] in ("model_type", "model_attributes_type"):
        return section_error(settings, path)
    message = first["msg"].removeprefix("Value error, ")
    value = first["input"]
    shown = f", got {value!r}" if path and not isinstance(value, dict | list) else ""
    return f"{name}: {message}{shown}" if name else message


def section_error(settings: type[BaseModel], path: list[str]) -> str:
    """Return the error for a plain value in place of a section; it suggests the first setting of the section."""
    name = ".".join(path)
    return (
        f"{name} is a section of settings; did you mean {name}.{next(iter(_section_at(settings, path).model_fields))}?"
    )


def _section_at(settings: type[BaseModel], path: list[str]) -> type[BaseModel]:
    for name in path:
        field = settings.model_fields.get(name)  # None for the index of a list
        if field is not None:
            settings = section_class(field.annotation) or settings
    return settings


def _plain_classes(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type):
        yield annotation
    for inner in get_args(annotation):
        yield from _plain_classes(inner)
