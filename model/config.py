"""What config.json says, checked: every complaint names the field and the value."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A checkpoint's config.json is missing, malformed or asks for what is not implemented."""


class Fields:
    """The fields of one config.json, taken with a type and a bound."""

    def __init__(self, values: dict[str, Any], source: str = "config.json") -> None:
        self.values = values
        self.source = source

    @classmethod
    def read(cls, directory: Path) -> Fields:
        """The fields of `directory`/config.json."""
        path = directory / "config.json"
        if not path.is_file():
            raise ConfigError(f"no config.json in {directory}: not a checkpoint directory")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds a {type(values).__name__}, an object is due")
        return cls(values, str(path))

    def but(self, **values: Any) -> Fields:
        """The same with other values in some fields."""
        return Fields(self.values | values, f"{self.source} and settings")

    def fail(self, name: str, due: str) -> ConfigError:
        """The complaint that field `name` is not what is due."""
        return ConfigError(f"{self.source}: {name} is {self.values.get(name)!r}, {due} is due")

    def integer(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """An integer of at least `least`."""
        value = self.values.get(name, default)
        if type(value) is not int or value < least:
            raise self.fail(name, f"an integer >= {least}")
        return value

    def optional_integer(self, name: str, *, least: int = 1) -> int | None:
        """An integer of at least `least`, or None where the field is null or not there."""
        return None if self.values.get(name) is None else self.integer(name, least=least)

    def flag(self, name: str, default: bool) -> bool:
        """True or false; null is the default."""
        value = self.values.get(name)
        value = default if value is None else value
        if type(value) is not bool:
            raise self.fail(name, "true or false")
        return value

    def number(self, name: str, default: float | None = None, *, above: float = -math.inf) -> float:
        """A finite number above `above`."""
        value = self.values.get(name, default)
        number = float(value) if isinstance(value, int | float) else math.nan
        if isinstance(value, bool) or not above < number < math.inf:
            bound = "" if above == -math.inf else f" above {above:g}"
            raise self.fail(name, f"a finite number{bound}")
        return number

    def rope(self) -> Fields:
        """The fields that say how heads turn: those of rope_parameters, which transformers 5
        writes, over those of config.json itself. No kind but the default is implemented."""
        self.only("rope_scaling", None)
        given = self.values.get("rope_parameters") or {}
        if (
            not isinstance(given, dict)
            or given.get("rope_type", "default") != "default"
            or any(isinstance(value, dict) for value in given.values())
        ):
            raise self.fail("rope_parameters", "an object with rope_type 'default'")
        return Fields(self.values | given, self.source)

    def only(self, name: str, *allowed: object) -> None:
        """The field, where it is there, must have one of the values that are implemented."""
        if name in self.values and self.values[name] not in allowed:
            raise self.fail(name, " or ".join(map(repr, allowed)))

    def without(self, name: str, why: str) -> None:
        """The field must not be there."""
        if name in self.values:
            raise ConfigError(f"{self.source}: {name} is {self.values[name]!r}, but {why}")

    @property
    def architecture(self) -> str:
        """The one entry of `architectures`."""
        names = self.values.get("architectures")
        if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
            raise self.fail("architectures", "a list of one name")
        return names[0]
