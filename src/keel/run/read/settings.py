"""Check the settings of a run folder before anything is computed from them.

The file may have been edited by hand, or written by another program.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from keel import config
from keel.config.supervised import SupervisedSettings
from keel.errors import CheckpointError

STAGES: dict[str, type[BaseModel]] = {
    "train": config.TrainConfig,
    "sft": config.SftConfig,
    "reward": config.RewardConfig,
    "dpo": config.DpoConfig,
}
LARGEST = 1e18  # number in a file that keel has written
TEXTS = ("model", "function", "url", "name")


def check_run_settings(settings: Mapping[str, Any], stage: str, where: str) -> None:
    """Raise CheckpointError for an invalid number, section or list of scorers.

    Unknown settings and text values pass, because another version of keel may have written them.
    """
    steps = {name: settings[name] for name in ("steps",) if name in settings}
    faults = [*_faults(config.TrainConfig, steps), *_faults(STAGES.get(stage, SupervisedSettings), settings)]
    rewards = settings.get("rewards")
    if rewards is not None and not _are_scorers(rewards):
        faults.append("rewards")
    if faults:
        raise CheckpointError(f"{faults[0]} has a value that keel cannot have written", where=where)


def _faults(section: type[BaseModel], saved: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name in section.model_fields.keys() & saved.keys():
        value, (inner, number) = saved[name], _kind(section, name)
        if value is None:
            continue
        if inner is not None:
            yield from _faults(inner, value, f"{prefix}{name}.") if isinstance(value, Mapping) else (prefix + name,)
        elif number is not None and not _is_valid(number, value):
            yield f"{prefix}{name}"


@cache
def _kind(section: type[BaseModel], name: str) -> tuple[type[BaseModel] | None, TypeAdapter[Any] | None]:
    """Return the class of a setting that is a section, and the validator of a setting that is a number."""
    field = section.model_fields[name]
    kinds = [kind for kind in _plain(field.annotation) if kind is not type(None)]
    if len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], BaseModel):
        return kinds[0], None
    return None, TypeAdapter(field.rebuild_annotation()) if set(kinds) <= {int, float} else None


def _plain(annotation: Any) -> list[Any]:
    """Return the members of a union or an annotated type."""
    match get_origin(annotation):
        case origin if origin is Annotated:
            return _plain(get_args(annotation)[0])
        case origin if origin in (Union, UnionType):
            return [kind for member in get_args(annotation) for kind in _plain(member)]
    return [annotation]


def _is_valid(number: TypeAdapter[Any], value: Any) -> bool:
    try:
        return abs(number.validate_python(value, strict=True)) <= LARGEST
    except ValidationError:
        return False


def named_sources(rewards: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return name -> settings of each scorer. Raises ValueError where two scorers have the same name."""
    names = config.scorer_names([config.RewardSource.model_construct(**source) for source in rewards])
    return dict(zip(names, rewards, strict=True))


def _are_scorers(rewards: Any) -> bool:
    if not isinstance(rewards, list) or not all(_is_scorer(source) for source in rewards):
        return False
    try:
        return len(named_sources(rewards)) == len(rewards)
    except ValueError:
        return False


def _is_scorer(source: Any) -> bool:
    if not isinstance(source, dict) or not all(isinstance(name, str) for name in source):
        return False
    weight = source.get("weight", 1.0)
    is_number = isinstance(weight, int | float) and abs(weight) <= LARGEST
    return is_number and all(isinstance(source.get(name), str | None) for name in TEXTS)
