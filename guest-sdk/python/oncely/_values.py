"""SQL values in Python and as the kinds of the host's interface."""

import json
import uuid
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any

from .sql import SqlError

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
MICROSECOND = timedelta(microseconds=1)


def timestamp(moment: datetime) -> int:
    """Microseconds since the Unix epoch."""
    if moment.tzinfo is None:
        raise SqlError("invalid-parameter", "a datetime needs a time zone: use datetime.now(timezone.utc)")
    return (moment - EPOCH) // MICROSECOND


def moment(timestamp: int) -> datetime:
    """The time in UTC."""
    return EPOCH + timestamp * MICROSECOND


def encode(value: Any) -> tuple[str, Any]:
    """The kind of a parameter, such as `int64`, and its form in the interface."""
    if value is None:
        return "null", None
    if isinstance(value, bool):
        return "boolean", value
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise SqlError("invalid-parameter", f"{value} does not fit into 64 bits; use a Decimal")
        return "int64", value
    if isinstance(value, float):
        return "float64", value
    if isinstance(value, Decimal):
        return "decimal", format(value, "f")
    if isinstance(value, str):
        return "text", value
    if isinstance(value, (bytes, bytearray, memoryview)):
        return "bytes", bytes(value)
    if isinstance(value, uuid.UUID):
        return "uuid", str(value)
    if isinstance(value, datetime):
        return "timestamp", timestamp(value)
    if isinstance(value, date):
        return "date", value.isoformat()
    if isinstance(value, time):
        return "time", value.isoformat()
    if isinstance(value, (dict, list, tuple)):
        return "json", json.dumps(value, separators=(",", ":"))
    raise SqlError("invalid-parameter", f"a parameter of type {type(value).__name__} is not supported")


def _date(text: str) -> Any:
    # PostgreSQL has dates that Python has not, such as `infinity`.
    try:
        return date.fromisoformat(text)
    except ValueError:
        return text


def _time(text: str) -> Any:
    try:
        return time.fromisoformat(text)
    except ValueError:
        return text


def _moment(value: int) -> Any:
    try:
        return moment(value)
    except OverflowError:
        return value


DECODE: dict[str, Callable[[Any], Any]] = {
    "boolean": bool,
    "int64": int,
    "float64": float,
    "decimal": Decimal,
    "text": str,
    "bytes": bytes,
    "uuid": uuid.UUID,
    "json": json.loads,
    "timestamp": _moment,
    "date": _date,
    "time": _time,
}
