"""Conversion of JSON to the annotated type of a handler's payload."""

import dataclasses
import enum
import json
import types
import typing
import uuid
from datetime import date, datetime, time
from decimal import Decimal
from functools import cache
from typing import Any

from ._errors import Reject


class _Mismatch(Exception):
    def __init__(self, path: str, why: str):
        super().__init__(f"{path}: {why}" if path else why)


def parse(body: bytes, wanted: Any) -> Any:
    """Reads a JSON body as a type. Rejects the message with the path of a value that does not fit."""
    try:
        # An exact decimal keeps every digit of the body.
        value = json.loads(body, parse_float=Decimal)
    except ValueError as error:
        raise Reject(f"the body is not JSON: {error}", code="malformed") from None
    try:
        return _convert(value, wanted, "")
    except _Mismatch as error:
        raise Reject(f"the body does not fit {_name(wanted)}: {error}", code="malformed") from None


def _convert(value: Any, wanted: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any:
        return _plain(value)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, arguments, path)
    if origin is typing.Literal:
        if value not in arguments:
            raise _Mismatch(path, f"{value!r} is none of {', '.join(map(repr, arguments))}")
        return value
    if origin in (list, set, frozenset, tuple):
        return _convert_sequence(value, origin, arguments, path)
    if origin is dict:
        if not isinstance(value, dict):
            raise _Mismatch(path, f"an object is expected, found {_kind(value)}")
        inner = arguments[1] if len(arguments) == 2 else Any
        return {key: _convert(item, inner, _join(path, key)) for key, item in value.items()}
    if dataclasses.is_dataclass(wanted):
        return _convert_dataclass(value, wanted, path)
    if isinstance(wanted, type):
        return _convert_scalar(value, wanted, path)
    raise _Mismatch(path, f"the type {wanted!r} is not supported")


def _convert_union(value: Any, arguments: tuple[Any, ...], path: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    choices = [choice for choice in arguments if choice is not type(None)]
    for choice in choices:
        try:
            return _convert(value, choice, path)
        except _Mismatch as error:
            last = error
    if len(choices) == 1:
        raise last
    names = ", ".join(_name(choice) for choice in choices)
    raise _Mismatch(path, f"{_kind(value)} is none of {names}")


def _convert_sequence(value: Any, origin: Any, arguments: tuple[Any, ...], path: str) -> Any:
    if not isinstance(value, list):
        raise _Mismatch(path, f"an array is expected, found {_kind(value)}")
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(arguments) != len(value):
            raise _Mismatch(path, f"{len(arguments)} items are expected, found {len(value)}")
        types_of = list(arguments)
    else:
        types_of = [arguments[0] if arguments else Any] * len(value)
    items = [
        _convert(item, inner, f"{path}[{at}]")
        for at, (item, inner) in enumerate(zip(value, types_of))
    ]
    return origin(items)


@cache
def _fields(wanted: type) -> list[tuple[str, Any, bool]]:
    hints = typing.get_type_hints(wanted)
    missing = dataclasses.MISSING
    return [
        (one.name, hints[one.name], one.default is missing and one.default_factory is missing)
        for one in dataclasses.fields(wanted)
        if one.init
    ]


def _convert_dataclass(value: Any, wanted: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise _Mismatch(path, f"an object is expected, found {_kind(value)}")
    given = {}
    for name, inner, is_required in _fields(wanted):
        if name in value:
            given[name] = _convert(value[name], inner, _join(path, name))
        elif is_required:
            raise _Mismatch(_join(path, name), "is missing")
    try:
        return wanted(**given)
    except (ValueError, TypeError) as error:
        # Its `__post_init__` refuses the values.
        raise _Mismatch(path, str(error)) from None


def _convert_scalar(value: Any, wanted: type, path: str) -> Any:
    is_number = isinstance(value, (int, Decimal)) and not isinstance(value, bool)
    try:
        if issubclass(wanted, enum.Enum):
            return wanted(value)
        if wanted is float and is_number:
            return float(value)
        if wanted is Decimal and (is_number or isinstance(value, str)):
            return Decimal(value)
        if wanted is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if wanted in (str, bool, dict, list) and isinstance(value, wanted):
            return _plain(value)
        if wanted is type(None) and value is None:
            return None
        if isinstance(value, str):
            if wanted in (datetime, date, time):
                return wanted.fromisoformat(value)
            if wanted is uuid.UUID:
                return uuid.UUID(value)
    except (ValueError, ArithmeticError):
        pass
    raise _Mismatch(path, f"{_name(wanted)} is expected, found {_kind(value)}")


def _plain(value: Any) -> Any:
    """The value with ordinary floats, as `json.loads` returns it."""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _name(wanted: Any) -> str:
    return getattr(wanted, "__name__", None) or str(wanted)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "an array"
    text = json.dumps(value if not isinstance(value, Decimal) else float(value))
    return text if len(text) <= 40 else f"{text[:39]}…"
