"""Strict loading: a TOML table becomes a frozen dataclass, or one line says what is wrong.

Owns unknown-key, missing-key, type and range checks, `--set` overrides, references to other
files by name, and the fingerprint. Which fields exist is said by the dataclasses, nowhere else.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Config = typing.TypeVar("Config")


class ConfigError(ValueError):
    """A configuration that can't be used. `str(error)` is one line: source, key, what is wrong."""

    def __init__(self, message: str, *, key: str = "", source: str = "") -> None:
        self.message, self.key, self.source = message, key, source
        super().__init__(": ".join(part for part in (source, key, message) if part))

    def within(self, key: str, source: str) -> "ConfigError":
        """The same error as seen from an enclosing table."""
        joined = ".".join(part for part in (key, self.key) if part)
        return ConfigError(self.message, key=joined, source=self.source or source)


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number, used as `Annotated[float, Range(0.0, 1.0)]`; `above` is exclusive."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None

    def complaint(self, value: float) -> str | None:
        """What is wrong with the value, or None."""
        if not math.isfinite(value):
            return f"{value} is not finite"
        if self.at_least is not None and value < self.at_least:
            return f"{value} is below the least allowed, {self.at_least}"
        if self.above is not None and value <= self.above:
            return f"{value} must be above {self.above}"
        if self.at_most is not None and value > self.at_most:
            return f"{value} is over the most allowed, {self.at_most}"
        return None


Positive = Range(above=0)
NotNegative = Range(at_least=0)
Fraction = Range(at_least=0.0, at_most=1.0)


def nearest(name: str, names: Sequence[str]) -> str:
    """` (did you mean 'x'?)` for the closest known name, else the list of known names."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f" (did you mean '{close[0]}'?)"
    return f" (known: {', '.join(sorted(names))})" if names else ""


def check_ranges(config: object) -> None:
    """Check the `Range` bounds of a dataclass's fields; for `__post_init__`.

    Raises:
      ConfigError: naming the first field out of range.
    """
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        if value is None:
            continue
        bound = _range_of(hint)
        if bound is not None:
            for item in value if isinstance(value, tuple) else (value,):
                complaint = bound.complaint(item)
                if complaint:
                    raise ConfigError(complaint, key=name)


def from_table(cls: type[Config], table: Mapping[str, Any], source: str) -> Config:
    """Build `cls` from a TOML table.

    Args:
      cls: a dataclass. Fields may be scalars, `Literal`s, nested dataclasses, tuples of either,
        mappings from names to either, optionals, unions of scalars, and unions of dataclasses
        told apart by their `kind` field.
      table: parsed TOML.
      source: the file name for messages.

    Raises:
      ConfigError: unknown or missing key, wrong type, value out of range.
    """
    hints = _hints(cls)
    for key in table:
        if key not in hints:
            raise ConfigError(f"unknown key{nearest(key, list(hints))}", key=key, source=source)
    values = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in table:
            try:
                values[field.name] = _convert(hints[field.name], table[field.name], source)
            except ConfigError as error:
                raise error.within(field.name, source) from None
        elif _required(field):
            raise ConfigError("missing key", key=field.name, source=source)
    try:
        return cls(**values)
    except ConfigError as error:
        raise error.within("", source) from None


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file.

    Raises:
      ConfigError: absent or malformed file, with the line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("no such file", source=str(path)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(error), source=str(path)) from None


def apply_overrides(table: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `table` with `a.b=value` assignments applied; list items by number, `a.0.b=1`.

    A value is TOML (`1e-3`, `true`, `"text"`, `[1, 2]`); what isn't TOML is taken as a string.

    Raises:
      ConfigError: no `=`, or a path through something that is not a table.
    """
    result = json.loads(json.dumps(table))
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path.strip():
            raise ConfigError(f"'{override}' is not of the form key=value", source="--set")
        *parents, last = path.strip().split(".")
        place: Any = result
        for depth, key in enumerate(parents):
            place = _descend(place, key, ".".join(parents[: depth + 1]))
        if isinstance(place, list):
            place[_list_index(place, last, path)] = _toml_value(text)
        elif isinstance(place, dict):
            place[last] = _toml_value(text)
        else:
            raise ConfigError("its parent is not a table", key=path, source="--set")
    return result


def to_table(config: object) -> Any:
    """The inverse of `from_table`: plain dicts, lists and scalars; unset optionals are left out."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        pairs = ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config))
        return {name: to_table(value) for name, value in pairs if value is not None}
    if isinstance(config, tuple | list):
        return [to_table(item) for item in config]
    if isinstance(config, Mapping):
        return {key: to_table(item) for key, item in config.items()}
    return config


def to_toml(table: Mapping[str, Any], prefix: str = "") -> str:
    """TOML text of a table made by `to_table`: scalars first, then tables, then tables in lists."""
    plain, tables, lists = [], [], []
    for key, value in table.items():
        if isinstance(value, Mapping):
            tables.append(f"\n[{prefix}{key}]\n{to_toml(value, f'{prefix}{key}.')}")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            lists += [f"\n[[{prefix}{key}]]\n{to_toml(v, f'{prefix}{key}.')}" for v in value]
        else:
            plain.append(f"{key} = {_toml_text(value)}\n")
    return "".join(plain + tables + lists)


def fingerprint(config: object) -> str:
    """Sixteen hex digits that differ when any resolved field differs."""
    text = json.dumps(to_table(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_SCALARS = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _required(field: dataclasses.Field[Any]) -> bool:
    unset = dataclasses.MISSING
    return field.default is unset and field.default_factory is unset


def _range_of(hint: Any) -> Range | None:
    if typing.get_origin(hint) is typing.Annotated:
        return next((extra for extra in hint.__metadata__ if isinstance(extra, Range)), None)
    for argument in typing.get_args(hint):
        found = _range_of(argument)
        if found is not None:
            return found
    return None


def _convert(hint: Any, value: Any, source: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _convert(arguments[0], value, source)
    if origin is typing.Literal:
        if value not in arguments or type(value) not in {type(a) for a in arguments}:
            suggestion = nearest(str(value), [str(a) for a in arguments])
            raise ConfigError(f"unknown value {value!r}{suggestion}", source=source)
        return value
    if origin in (types.UnionType, typing.Union):
        return _convert_union([a for a in arguments if a is not type(None)], value, source)
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"expected a list, got {_type_name(value)}", source=source)
        return tuple(_convert_item(arguments[0], i, v, source) for i, v in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigError(f"expected a table, got {_type_name(value)}", source=source)
        return {key: _convert_item(arguments[1], key, item, source) for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"expected a table, got {_type_name(value)}", source=source)
        return from_table(typing.cast(type, hint), value, source)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        wanted = _SCALARS.get(hint, str(hint))
        raise ConfigError(f"expected {wanted}, got {_type_name(value)} {value!r}", source=source)
    return value


def _convert_item(hint: Any, index: int | str, value: Any, source: str) -> Any:
    try:
        return _convert(hint, value, source)
    except ConfigError as error:
        raise error.within(str(index), source) from None


def _convert_union(members: list[Any], value: Any, source: str) -> Any:
    if len(members) == 1:
        return _convert(members[0], value, source)
    if all(member in _SCALARS for member in members):
        if type(value) not in members:
            wanted = " or ".join(_SCALARS[member] for member in members)
            raise ConfigError(f"expected {wanted}, got {_type_name(value)}", source=source)
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"expected a table, got {_type_name(value)}", source=source)
    kinds = {_kind_of(member): member for member in members}
    if "kind" not in value:
        raise ConfigError(f"missing key; one of {', '.join(kinds)}", key="kind", source=source)
    if value["kind"] not in kinds:
        suggestion = nearest(str(value["kind"]), list(kinds))
        raise ConfigError(f"unknown kind {value['kind']!r}{suggestion}", key="kind", source=source)
    return from_table(kinds[value["kind"]], value, source)


def _kind_of(member: Any) -> str:
    return typing.get_args(_hints(member)["kind"])[0]


def _type_name(value: Any) -> str:
    names = {dict: "a table", list: "a list", str: "the string", bool: "the boolean"}
    return names.get(type(value), f"the {type(value).__name__}")


def _descend(place: Any, key: str, path: str) -> Any:
    if isinstance(place, list):
        return place[_list_index(place, key, path)]
    if isinstance(place, dict):
        return place.setdefault(key, {})
    raise ConfigError("its parent is not a table", key=path, source="--set")


def _list_index(place: list[Any], key: str, path: str) -> int:
    if not key.isdigit() or int(key) >= len(place):
        raise ConfigError(
            f"'{key}' is not an item number below {len(place)}", key=path, source="--set"
        )
    return int(key)


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text.strip()


def _toml_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(_toml_text(item) for item in value) + "]"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which JSON leaves raw and TOML forbids.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
