"""Messages that are published after the transaction has committed, never before."""

import json
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

from ._backend import backend


class OutboxError(Exception):
    """A refused message. The effects of the handler are rolled back, even if it is caught.

    `reason` is `invalid-subject`, `invalid-header`, `invalid-id`, `not-granted`, `too-large`,
    `too-many` or `other`.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(f"{reason}: {message}")
        self.reason = reason


def send(
    subject: str,
    body: Any = b"",
    *,
    headers: Mapping[str, str] | Iterable[tuple[str, str]] = (),
    id: str | None = None,
    ordering_key: str | None = None,
    delay: timedelta | float | None = None,
    caused_by: str | None = None,
) -> str:
    """Adds a message to the outbox and returns its id.

    `bytes` and `str` are the body as it is, everything else becomes JSON. `id` is
    `{worker}:{event id}:{ordinal}` by default. Messages with the same `ordering_key` are published
    in commit order. `delay` counts from the commit, a number in seconds. A batch handler sets
    `caused_by` to the id of the message that caused this one.
    """
    pairs = list(headers.items() if isinstance(headers, Mapping) else headers)
    return backend().send(
        subject, pairs, _encode(body), id, ordering_key, _milliseconds(delay), caused_by
    )


def _encode(body: Any) -> bytes:
    if isinstance(body, (bytes, bytearray, memoryview)):
        return bytes(body)
    if isinstance(body, str):
        return body.encode()
    return json.dumps(body, separators=(",", ":"), default=_json_default).encode()


def _json_default(value: Any) -> Any:
    import dataclasses

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return str(value)


def _milliseconds(delay: timedelta | float | None) -> int | None:
    if delay is None:
        return None
    seconds = delay.total_seconds() if isinstance(delay, timedelta) else delay
    return max(0, round(seconds * 1000))
