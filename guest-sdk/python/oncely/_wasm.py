"""Oncely as the host: the bindings of componentize-py behind the functions of this package."""

import logging
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from componentize_py_types import Err
from wit_world.imports import cache as wit_cache
from wit_world.imports import invocation as wit_invocation
from wit_world.imports import logging as wit_logging
from wit_world.imports import outbox as wit_outbox
from wit_world.imports import sql as wit_sql
from wit_world.imports import state as wit_state
from wit_world.imports import store as wit_config
from wit_world.imports import types as wit_types

from . import _values, cache, outbox, sql, state
from ._errors import Failure, Reject, RetryAfter
from ._message import Message, Origin

_PARAMS = {
    "boolean": wit_sql.Value_Boolean,
    "int64": wit_sql.Value_Int64,
    "float64": wit_sql.Value_Float64,
    "decimal": wit_sql.Value_Decimal,
    "text": wit_sql.Value_Text,
    "bytes": wit_sql.Value_Bytes,
    "uuid": wit_sql.Value_Uuid,
    "json": wit_sql.Value_Json,
    "timestamp": wit_sql.Value_Timestamp,
    "date": wit_sql.Value_Date,
    "time": wit_sql.Value_Time,
}
_DECODE = {kind: _values.DECODE[name] for name, kind in _PARAMS.items()}


def _reason(error: Any) -> str:
    """`Error_NotGranted` as `not-granted`."""
    name = type(error).__name__.removeprefix("Error_")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()


# Outbox


def send(
    subject: str,
    headers: list[tuple[str, str]],
    body: bytes,
    id: str | None,
    ordering_key: str | None,
    delay: int | None,
    caused_by: str | None,
) -> str:
    outgoing = wit_outbox.Outgoing(subject, headers, body, id, ordering_key, delay, caused_by)
    try:
        return wit_outbox.send(outgoing)
    except Err as error:
        raise outbox.OutboxError(_reason(error.value), error.value.value) from None


# State


def _state_error(error: Any) -> state.StateError:
    if isinstance(error, wit_state.Error_VersionMismatch):
        return state.VersionMismatch(error.value)
    return state.StateError(_reason(error), error.value)


def state_get(key: str) -> state.Entry | None:
    try:
        entry = wit_state.get(key)
    except Err as error:
        raise _state_error(error.value) from None
    return None if entry is None else state.Entry(entry.value, entry.version)


def state_set(key: str, value: bytes) -> int:
    try:
        return wit_state.set(key, value)
    except Err as error:
        raise _state_error(error.value) from None


def state_delete(key: str) -> bool:
    try:
        return wit_state.delete(key)
    except Err as error:
        raise _state_error(error.value) from None


def state_compare_and_set(key: str, expected: int | None, value: bytes) -> int:
    try:
        return wit_state.compare_and_set(key, expected, value)
    except Err as error:
        raise _state_error(error.value) from None


# SQL


def _params(values: tuple[Any, ...]) -> list[Any]:
    params = []
    for value in values:
        kind, form = _values.encode(value)
        params.append(wit_sql.Value_Null() if kind == "null" else _PARAMS[kind](form))
    return params


def _sql_error(error: Any) -> sql.SqlError:
    detail = getattr(error, "value", None)
    if isinstance(error, wit_sql.Error_ConstraintViolation):
        return sql.ConstraintViolation(
            detail.message, code=detail.code, constraint=detail.constraint
        )
    if isinstance(error, wit_sql.Error_Conflict):
        return sql.Conflict(detail.message, code=detail.code)
    if isinstance(error, wit_sql.Error_QueryFailed):
        return sql.SqlError("query-failed", detail.message, code=detail.code)
    return sql.SqlError(_reason(error), detail or "the time limit of this delivery was reached")


def query(statement: str, params: tuple[Any, ...]) -> list[dict[str, Any]]:
    try:
        found = wit_sql.query(statement, _params(params))
    except Err as error:
        raise _sql_error(error.value) from None
    columns = found.columns
    return [dict(zip(columns, map(_decode, row))) for row in found.rows]


def _decode(value: Any) -> Any:
    decode = _DECODE.get(type(value))
    return None if decode is None else decode(value.value)


def execute(statement: str, params: tuple[Any, ...]) -> int:
    try:
        return wit_sql.execute(statement, _params(params))
    except Err as error:
        raise _sql_error(error.value) from None


def defer(statement: str, params: tuple[Any, ...]) -> None:
    try:
        wit_sql.defer(statement, _params(params))
    except Err as error:
        raise _sql_error(error.value) from None


def dialect() -> str:
    return wit_sql.get_dialect().name.lower()


# Cache


def _cache_error(error: Any) -> cache.CacheError:
    return cache.CacheError(_reason(error), error.value)


def cache_get(key: str) -> bytes | None:
    try:
        return wit_cache.get(key)
    except Err as error:
        raise _cache_error(error.value) from None


def cache_put(key: str, value: bytes, ttl: int, tags: list[str]) -> None:
    try:
        wit_cache.put(key, value, ttl, tags)
    except Err as error:
        raise _cache_error(error.value) from None


def cache_invalidate(tags: list[str]) -> None:
    try:
        wit_cache.invalidate(tags)
    except Err as error:
        raise _cache_error(error.value) from None


# Configuration and the current delivery


def config_get(key: str) -> str | None:
    return wit_config.get(key)


invocation_id = wit_invocation.id
worker = wit_invocation.worker
version = wit_invocation.version
attempt = wit_invocation.attempt
max_attempts = wit_invocation.max_attempts
traceparent = wit_invocation.traceparent


def now() -> datetime:
    return _values.moment(wit_invocation.now())


def remaining() -> timedelta:
    return timedelta(milliseconds=wit_invocation.remaining())


# Handlers


def _message(given: wit_types.Message) -> Message:
    origin = given.origin
    return Message(
        given.id,
        given.subject,
        given.body,
        given.headers,
        origin and Origin(origin.stream, origin.sequence, _values.moment(origin.stored_at)),
    )


def _failure(failure: Failure) -> wit_types.Failure:
    if isinstance(failure, Reject):
        kind: Any = wit_types.FailureKind_Reject()
    elif isinstance(failure, RetryAfter):
        delay = max(0, round(failure.delay.total_seconds() * 1000))
        kind = wit_types.FailureKind_RetryAfter(delay)
    else:
        kind = wit_types.FailureKind_Retry()
    return wit_types.Failure(kind, failure.code, failure.message)


def handler_class(handle: Callable[[Message], None]) -> type:
    class Handler:
        def handle(self, message: wit_types.Message) -> None:
            try:
                handle(_message(message))
            except Failure as failure:
                raise Err(_failure(failure)) from None

    return Handler


def batch_handler_class(handle: Callable[[list[Message]], Any]) -> type:
    from componentize_py_types import Ok

    class BatchHandler:
        def handle_batch(self, messages: list[wit_types.Message]) -> list[Any]:
            results = handle([_message(message) for message in messages])
            if results is None:
                return [Ok(None)] * len(messages)
            return [Ok(None) if one is None else Err(_failure(one)) for one in results]

    return BatchHandler


# Logging


class _LogHandler(logging.Handler):
    """Records of the standard library's `logging` become log lines of the host."""

    def emit(self, record: logging.LogRecord) -> None:
        wit_logging.log(_level(record.levelno), record.name, self.format(record))


def _level(number: int) -> wit_logging.Level:
    levels = wit_logging.Level
    if number >= logging.CRITICAL:
        return levels.CRITICAL
    if number >= logging.ERROR:
        return levels.ERROR
    if number >= logging.WARNING:
        return levels.WARN
    if number >= logging.INFO:
        return levels.INFO
    return levels.DEBUG if number >= logging.DEBUG else levels.TRACE


logging.basicConfig(level=logging.INFO, handlers=[_LogHandler()], format="%(message)s")
