"""Flags out of the fields of Settings: a field is a flag is a STEADYSTATE_* variable."""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Collection
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined
from pydantic_settings import SettingsError

from server.settings import Settings

FLAG_PREFIX = "settings_"  # of the parsed arguments that are fields


def add_flags(
    parser: argparse.ArgumentParser, names: Collection[str] = Settings.model_fields.keys()
) -> None:
    """One flag a field. A flag that is not given leaves the field to variable and default."""
    group = parser.add_argument_group(
        "settings", "each also a variable, as in STEADYSTATE_PORT=8001; flags win"
    )
    for name in names:
        field = Settings.model_fields[name]
        flag = "--" + name.replace("_", "-")
        kind = _kind(field.annotation)
        options: dict[str, Any] = {
            "dest": FLAG_PREFIX + name,
            "default": argparse.SUPPRESS,
            "help": _help(field),
        }
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        elif get_origin(kind) is tuple:
            options |= {"action": "append", "metavar": "VALUE"}
        else:
            options["metavar"] = {int: "N", float: "X"}.get(kind, "VALUE")
        group.add_argument(flag, **options)


def settings_of(arguments: argparse.Namespace, **given: Any) -> Settings:
    """The settings that arguments ask for. Raises ValueError with a line for each mistake."""
    for name, value in vars(arguments).items():
        if name.startswith(FLAG_PREFIX):
            joined = ",".join(value) if isinstance(value, list) else value
            given[name.removeprefix(FLAG_PREFIX)] = joined
    try:
        return Settings(**given)
    except ValidationError as error:
        raise ValueError("\n".join(map(_line, error.errors()))) from error
    except SettingsError as error:
        raise ValueError(str(error)) from error


def _line(mistake: ErrorDetails) -> str:
    """One mistake. What concerns several fields came with all of them, keys and tokens too."""
    if not mistake["loc"]:
        return mistake["msg"]
    return f"{'.'.join(map(str, mistake['loc']))}: {mistake['msg']}, got {mistake['input']!r}"


def _kind(annotation: Any) -> Any:
    """The type without None."""
    if get_origin(annotation) in (typing.Union, types.UnionType):
        return next(kind for kind in get_args(annotation) if kind is not type(None))
    return annotation


def _help(field: FieldInfo) -> str:
    text = (field.description or "").replace("%", "%%")
    default = field.default
    if default is PydanticUndefined or default in (None, ()) or "default" in text:
        return text
    return f"{text} (default: {default})"
