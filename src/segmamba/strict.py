"""Plain values to frozen dataclasses, strictly."""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from segmamba.errors import ConfigError, describe

T = TypeVar("T")

_BEYOND, _DEEPEST_YAML = 2**63, 50

LARGEST_YAML = 64 << 10
"""Most bytes of a file of settings; the parser takes seconds for more."""


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
                found=reprlib.repr(data),
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
    try:
        return cls(**values)
    except ConfigError as error:  # the class's own checks know no file
        raise ConfigError(f"{error} In {source}.") from error


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a dataclass into plain nested values for JSON or YAML."""
    return dataclasses.asdict(config)


def load_yaml(path: Path | str) -> dict[str, Any]:
    """Read a YAML file of settings: plain keys and values.

    Tags that would make objects, aliases (which can make a small file endless) and
    keys that are there twice are refused.

    Raises:
        ConfigError: The file is missing, too large, not such YAML, or not a mapping.
    """
    try:
        data = _parse_yaml(_read_settings(Path(path)))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(
            describe("can't read a YAML file", found=_text(error), file=path)
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


def _read_settings(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(LARGEST_YAML + 1)
    if len(data) > LARGEST_YAML:
        raise ValueError(f"more than {LARGEST_YAML >> 10} KiB")
    return data.decode()


def _parse_yaml(text: str) -> Any:
    loader = _PlainLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _PlainLoader(yaml.SafeLoader):
    """YAML without objects, aliases, repeated keys and endless numbers."""

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        if self.flow_level >= _DEEPEST_YAML:  # each level slows down all others
            raise yaml.MarkedYAMLError(
                problem="values that are nested too deeply",
                problem_mark=self.get_mark(),
            )
        super().fetch_flow_collection_start(TokenClass)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            where = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="an alias (*)", problem_mark=where)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key.value, str) else None
            if name in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key '{name}' twice", problem_mark=key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


def _whole_number(loader: _PlainLoader, node: Any) -> int:
    value = loader.construct_yaml_int(node)
    if abs(value) >= _BEYOND:
        raise yaml.MarkedYAMLError(
            problem="a whole number beyond 64 bits", problem_mark=node.start_mark
        )
    return value


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def _text(error: Exception) -> str:
    """Say in one line what is wrong with a file of settings, and where in it."""
    if isinstance(error, RecursionError):
        return "values that are nested too deeply"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem} in line {mark.line + 1}, column {mark.column + 1}"
    return getattr(error, "strerror", None) or " ".join(str(error).split())


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
    if hint is float and (number or isinstance(value, str)):
        return _convert_float(value, where, source)
    if hint is int and number and abs(value) >= _BEYOND:
        raise _wrong(where, "a whole number of at most 64 bits", value, source)
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise _wrong(where, f"a value of type {hint.__name__}", value, source)


def _convert_float(value: Any, where: str, source: str) -> float:
    try:
        converted = float(value)  # text too: YAML 1.1 reads 1e-3 as one
    except (ValueError, OverflowError):
        raise _wrong(where, "a number", value, source) from None
    if not math.isfinite(converted):
        raise _wrong(where, "a finite number", value, source)
    return converted


def _wrong(where: str, expected: str, value: Any, source: str) -> ConfigError:
    return ConfigError(
        describe(
            f"bad value for {where}",
            expected=expected,
            found=reprlib.repr(value),
            file=source,
        )
    )
