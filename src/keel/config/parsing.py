"""From a plain mapping (a YAML file merged with the command line) to settings, or one clear ConfigError."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from keel.errors import ConfigError

SettingsT = TypeVar("SettingsT", bound=BaseModel)


def parse(settings: type[SettingsT], data: Mapping[str, Any], where: str = "settings") -> SettingsT:
    """Check a plain mapping against `settings`; raises ConfigError in one line, with the nearest known name."""
    try:
        return settings.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, settings), where=where) from None


def setting_names(settings: type[BaseModel], prefix: str = "", kind: Any = object) -> Iterator[str]:
    """Dotted names of all settings, e.g. `algorithm.kl_coef`; with `kind` only of those of that type."""
    for name, field in settings.model_fields.items():
        inner = section_class(field.annotation)
        if inner is None or name == "rewards":
            if kind in (object, field.annotation):
                yield prefix + name
        else:
            yield from setting_names(inner, f"{prefix}{name}.", kind)


def section_class(annotation: Any) -> type[BaseModel] | None:
    """The class of settings inside an annotation such as `list[X] | None`; None for a plain value."""
    return next((part for part in _parts(annotation) if issubclass(part, BaseModel)), None)


def nearest(name: str, known: list[str]) -> str:
    """A hint such as `did you mean kl_coef?`, or the whole list when nothing is near."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {match[0]}?" if match else f"known: {', '.join(known)}"


def _explain(error: ValidationError, settings: type[BaseModel]) -> str:
    # a misspelt name comes before what is missing for it
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    path = [str(part) for part in first["loc"]]
    name = ".".join(path)
    if first["type"] == "extra_forbidden":
        owner = _descend(settings, path[:-1])
        return f"unknown setting {name}; {nearest(path[-1], list(owner.model_fields))}"
    if first["type"] == "missing":
        return f"setting {name} is missing"
    if first["type"] in ("model_type", "model_attributes_type"):
        return not_a_section(settings, path)
    message = first["msg"].removeprefix("Value error, ")
    given = first["input"]
    shown = f", got {given!r}" if path and not isinstance(given, dict | list) else ""
    return f"{name}: {message}{shown}" if name else message


def not_a_section(settings: type[BaseModel], path: list[str]) -> str:
    """What to say when a plain value stands where a section should: its first setting is what was likely meant."""
    name = ".".join(path)
    return f"{name} is a section of settings; did you mean {name}.{next(iter(_descend(settings, path).model_fields))}?"


def _descend(settings: type[BaseModel], path: list[str]) -> type[BaseModel]:
    for part in path:
        field = settings.model_fields.get(part)
        if field is not None:
            settings = next((t for t in _parts(field.annotation) if issubclass(t, BaseModel)), settings)
    return settings


def _parts(annotation: Any) -> Iterator[type]:
    """The plain classes inside an annotation such as `list[X] | None`."""
    if isinstance(annotation, type):
        yield annotation
    for inner in get_args(annotation):
        yield from _parts(inner)
