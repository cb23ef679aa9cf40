"""Strict, frozen configuration: one schema per folder of `configs/`, errors with file and line."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.errors import ConfigError


class Frozen(BaseModel):
    """Root of every schema: a misspelt key or a later edit is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


Schema = TypeVar("Schema", bound=Frozen)


def load(path: str | Path, schema: type[Schema], overrides: Sequence[str] = ()) -> Schema:
    """Read a YAML (or JSON) file into ``schema``.

    ``overrides`` are ``key.sub=value`` texts, the value parsed as YAML; they win over the file.
    Raises ConfigError with every problem at once, each as ``file:line: field: what and why``.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; {_nearby(path)}") from None
    except IsADirectoryError:
        raise ConfigError(
            f"{path}: is a directory; name a file: {_nearby(path / 'x.yaml')}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text ({error})") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not YAML: {getattr(error, 'problem', error)}") from None
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}:1: the top level must be keys and values, not {raw!r:.40}")
    for override in overrides:
        _apply(raw, override)
    lines = dict(_lines(node)) if node else {}
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        if raw and set(schema.model_fields).isdisjoint(raw):
            raise ConfigError(
                f"{path}: none of its keys ({', '.join(map(str, raw))}) belongs to this kind of "
                f"file, which has {', '.join(schema.model_fields)}; is it meant for another verb?"
            ) from None
        raise ConfigError(_explain(error, schema, path, lines, overrides)) from None


def build(
    raw: Mapping[str, Any], schema: type[Schema], overrides: Sequence[str] = (), what: str = ""
) -> Schema:
    """Make a ``schema`` of what options said; ``overrides`` win over it, as in `load`.

    Raises ConfigError with every problem at once, each behind ``what``.
    """
    fields: dict[str, Any] = copy.deepcopy(dict(raw))
    for override in overrides:
        _apply(fields, override)
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(_explain(error, schema, Path(what or "options"), {}, overrides)) from None


def dump(config: Frozen) -> str:
    """Return ``config`` as JSON that ``load`` reads back to an equal value."""
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"


def schema_json(schema: type[Frozen]) -> str:
    """Return the JSON schema of one kind of file, for editors."""
    return json.dumps(schema.model_json_schema(), indent=2) + "\n"


def _nearby(path: Path) -> str:
    folder = path.parent
    found = sorted(folder.glob("*.y*ml")) or sorted(folder.glob("*/*.y*ml"))
    names = [str(path.relative_to(folder)) for path in found]
    if close := difflib.get_close_matches(path.name, names, n=1):
        return f"did you mean {folder / close[0]}?"
    return f"{folder}/ has {', '.join(names[:8])}" if names else f"{folder}/ holds no YAML file"


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r}: write it as key.sub=value")
    *parents, last = key.split(".")
    place = raw
    for part in parents:
        below = place.setdefault(part, {})
        if not isinstance(below, dict):
            raise ConfigError(f"--set {override!r}: {part} is {below!r}, not a group of fields")
        place = below
    try:
        place[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override!r}: {value!r} is not a YAML value") from None


def _lines(node: yaml.Node, at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], int]]:
    """Yield (location, 1-based line) for every key and item of a YAML tree."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*at, key.value)
            yield here, key.start_mark.line + 1
            yield from _lines(value, here)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            here = (*at, index)
            yield here, value.start_mark.line + 1
            yield from _lines(value, here)


def _explain(
    error: ValidationError,
    schema: type[Frozen],
    path: Path,
    lines: dict[tuple[Any, ...], int],
    overrides: Sequence[str],
) -> str:
    told = []
    problems = error.errors()
    places = [tuple(problem["loc"]) for problem in problems]
    for problem, loc in zip(problems, places, strict=True):
        if problem["type"] == "too_short" and any(
            place[: len(loc)] == loc for place in places if place != loc
        ):
            continue  # its items are there, and wrong: told on their own
        line = _line_of(loc, lines)
        field = ".".join(str(part) for part in _without_tags(loc, lines))
        text = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            text = f"unknown key {loc[-1]!r}; {_suggest(loc, schema)}"
        elif problem["type"] == "missing":
            text = "is required"
        elif problem["type"] == "union_tag_invalid":
            told_by = problem["ctx"]
            key = told_by["discriminator"].strip("'")
            line = _line_of((*loc, key), lines)
            field = f"{field}.{key}"
            text = f"{told_by['tag']!r:.40} is none of {told_by['expected_tags']}"
        elif problem["type"] not in {"value_error"}:
            text = f"{text}, not {problem['input']!r:.60}"
        where = f"{path}:{line}" if line else str(path)
        if any(override.split("=")[0] == field for override in overrides):
            where = f"--set {field}"
        told.append(f"{where}: {field}: {text}" if field else f"{where}: {text}")
    return "\n".join(told)


def _line_of(loc: tuple[Any, ...], lines: dict[tuple[Any, ...], int]) -> int | None:
    # pydantic puts the tag of a union into the location; the file has no such level
    trail: list[Any] = []
    line = None
    for part in loc:
        if (*trail, part) in lines:
            trail.append(part)
            line = lines[tuple(trail)]
    return line


def _without_tags(loc: tuple[Any, ...], lines: dict[tuple[Any, ...], int]) -> tuple[Any, ...]:
    """Return a location without the tags of unions, as far as the file shows which they are."""
    for index in range(len(loc) - 1):
        rest = (*loc[:index], *loc[index + 1 :])
        if loc[: index + 1] not in lines and rest[: index + 1] in lines:
            return _without_tags(rest, lines)
    return loc


def _suggest(loc: tuple[Any, ...], schema: type[Frozen]) -> str:
    known = sorted(_fields_at(loc[:-1], schema))
    if close := difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.6):
        return f"did you mean {close[0]!r}?"
    return f"this place knows: {', '.join(known)}"


def _fields_at(loc: tuple[Any, ...], schema: type[Frozen]) -> set[str]:
    """Return the field names that are legal where ``loc`` points, over all union members."""
    here: set[Any] = {schema}
    for part in loc:
        if isinstance(part, int):
            continue
        step = {
            inner
            for model in here
            if part in model.model_fields
            for inner in _models(model.model_fields[part].annotation)
        }
        here = step or here  # a union's tag: stay where we are
    return {name for model in here for name in model.model_fields}


def _models(annotation: Any) -> set[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    if get_origin(annotation) in {Union, list, tuple, dict} or get_args(annotation):
        return {model for arg in get_args(annotation) for model in _models(arg)}
    return set()
