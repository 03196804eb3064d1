"""The current delivery: its id, attempt, version and time limit."""

from datetime import datetime, timedelta

from ._backend import backend


def id() -> str:
    """An id that is the same for every attempt at this message. Pass it to other systems as an
    idempotency key."""
    return backend().invocation_id()


def worker() -> str:
    """The name of the worker."""
    return backend().worker()


def version() -> int:
    """The version of the running deployment."""
    return backend().version()


def attempt() -> int:
    """The number of this attempt, from 1."""
    return backend().attempt()


def max_attempts() -> int:
    """The number of attempts after which the message becomes a dead letter."""
    return backend().max_attempts()


def now() -> datetime:
    """The time at which this attempt began, in UTC."""
    return backend().now()


def remaining() -> timedelta:
    """The time that the handler has left."""
    return backend().remaining()


def traceparent() -> str | None:
    """The W3C trace context of the message."""
    return backend().traceparent()
