"""Plain values to frozen dataclasses, strictly."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from segmamba.errors import ConfigError, describe

T = TypeVar("T")


def from_dict(cls: type[T], data: Any, *, source: str = "the configuration") -> T:
    """Build a dataclass from nested plain values, strictly.

    Args:
        cls: A dataclass type.
        data: A mapping of its fields; fields left out keep their defaults.
        source: What the error names, such as a file.

    Returns:
        The dataclass.

    Raises:
        ConfigError: A key is unknown (the nearest one is named), one without a
            default is missing, or a value has the wrong type.
    """
    if not isinstance(data, dict):
        raise ConfigError(
            describe(
                f"{cls.__name__} is not a mapping",
                expected="keys and values",
                found=repr(data)[:60],
                file=source,
            )
        )
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(typing.cast(Any, cls))
    names = [item.name for item in fields]
    for key in data:
        if key not in names:
            raise ConfigError(_unknown_key(str(key), names, source))
    required = [
        item.name
        for item in fields
        if item.default is dataclasses.MISSING
        and item.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in data]
    if missing:
        raise ConfigError(
            describe("a key is missing", expected=", ".join(missing), file=source)
        )
    values = {
        key: _convert(value, hints[key], f"{cls.__name__}.{key}", source)
        for key, value in data.items()
    }
    return cls(**values)


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a dataclass into plain nested values for JSON or YAML."""
    return dataclasses.asdict(config)


def load_yaml(path: Path | str) -> dict[str, Any]:
    """Read a YAML file of settings.

    Raises:
        ConfigError: The file is missing, is not YAML, or is not a mapping.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(
            describe("can't read a YAML file", found=str(error), file=path)
        ) from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            describe(
                "a configuration file must be a mapping",
                expected="lines such as 'learning_rate: 0.01'",
                found=type(data).__name__,
                file=path,
            )
        )
    return data


def _unknown_key(key: str, names: list[str], source: str) -> str:
    close = difflib.get_close_matches(key, names, n=1)
    remedy = f"Did you mean '{close[0]}'?" if close else None
    return describe(
        f"unknown key '{key}'",
        expected="one of " + ", ".join(names),
        file=source,
        remedy=remedy,
    )


def _convert(value: Any, hint: Any, where: str, source: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, args, where, source)
    if origin is Literal:
        if value in args:
            return value
        raise _wrong(where, "one of " + ", ".join(map(str, args)), value, source)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(Any, hint), value, source=source)
    if origin is tuple:
        return _convert_tuple(value, args, where, source)
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(where, "a mapping", value, source)
        return {
            _convert(k, args[0], where, source): _convert(v, args[1], where, source)
            for k, v in value.items()
        }
    return _convert_scalar(value, hint, where, source)


def _convert_union(value: Any, args: Any, where: str, source: str) -> Any:
    if value is None and type(None) in args:
        return None
    options = [arg for arg in args if arg is not type(None)]
    if all(dataclasses.is_dataclass(option) for option in options):
        return from_dict(_described(options, value), value, source=source)
    error: ConfigError | None = None
    for option in options:
        try:
            return _convert(value, option, where, source)
        except ConfigError as failed:
            error = failed
    assert error is not None
    raise error


def _described(options: list[Any], value: Any) -> Any:
    """Choose the dataclass whose NAMES have the value's name; else the first."""
    name = value.get("name") if isinstance(value, dict) else None
    named = [option for option in options if name in getattr(option, "NAMES", ())]
    return (named or options)[0]


def _convert_tuple(value: Any, args: Any, where: str, source: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise _wrong(where, "a list", value, source)
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_convert(item, args[0], where, source) for item in value)
    if len(value) != len(args):
        raise _wrong(where, f"a list of {len(args)}", value, source)
    pairs = zip(value, args, strict=True)
    return tuple(_convert(item, arg, where, source) for item, arg in pairs)


def _convert_scalar(value: Any, hint: Any, where: str, source: str) -> Any:
    if hint is Any:
        return value
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and number:
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            return float(value)
        except ValueError:
            raise _wrong(where, "a number", value, source) from None
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise _wrong(where, f"a value of type {hint.__name__}", value, source)


def _wrong(where: str, expected: str, value: Any, source: str) -> ConfigError:
    return ConfigError(
        describe(
            f"bad value for {where}",
            expected=expected,
            found=repr(value)[:60],
            file=source,
        )
    )
