"""Run handlers without WebAssembly, with SQLite in memory.

    import unittest
    from oncely import testing
    from app import handle

    class Orders(unittest.TestCase):
        def test_an_order_is_accepted(self):
            with testing.host(migrations="migrations") as host:
                host.deliver(handle, {"id": "o1", "cents": 500})
                self.assertEqual(host.outputs[0].json(), {"id": "o1"})

The rules of the host on statements, subjects and limits do not apply here. `oncely dev` shows them.
"""

import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from . import _backend, _values, sql
from .outbox import _encode
from .state import Entry, VersionMismatch
from ._message import Message


@dataclass(frozen=True)
class Output:
    """A message that the handler sent."""

    id: str
    subject: str
    body: bytes
    headers: list[tuple[str, str]]
    ordering_key: str | None
    delay: timedelta | None

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


@dataclass
class Host:
    """A host for tests. Its fields may be read and set between deliveries."""

    database: sqlite3.Connection
    state: dict[str, Entry] = field(default_factory=dict)
    outputs: list[Output] = field(default_factory=list)
    """The messages that were sent by deliveries that took effect."""
    cache: dict[str, bytes] = field(default_factory=dict)
    config: dict[str, str] = field(default_factory=dict)
    now_is: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    attempt_is: int = 1
    _message: Message | None = None
    _sent: list[Output] = field(default_factory=list)
    _last_version: int = 0

    def deliver(
        self,
        handle: Callable[[Message], None],
        body: Any = b"",
        *,
        id: str = "event-1",
        subject: str = "test",
        headers: list[tuple[str, str]] | None = None,
    ) -> None:
        """Delivers one message. An exception of the handler rolls its effects back and is raised."""
        message = Message(id, subject, _encode(body), headers or [])
        before = (dict(self.state), dict(self.cache), self._last_version)
        self._message, self._sent = message, []
        self.database.execute("begin")
        try:
            handle(message)
        except BaseException:
            self.database.execute("rollback")
            self.state, self.cache, self._last_version = before
            raise
        self.database.execute("commit")
        self.outputs.extend(self._sent)

    def rows(self, query: str, *params: Any) -> list[dict[str, Any]]:
        """The rows of a query, for assertions."""
        return self.query(query, params)

    # The functions behind `oncely.outbox`, `oncely.state` and the others

    def send(
        self,
        subject: str,
        headers: list[tuple[str, str]],
        body: bytes,
        id: str | None,
        ordering_key: str | None,
        delay: int | None,
        caused_by: str | None,
    ) -> str:
        event = caused_by or (self._message.id if self._message else "")
        id = id or f"worker:{event}:{len(self._sent)}"
        later = None if delay is None else timedelta(milliseconds=delay)
        self._sent.append(Output(id, subject, body, headers, ordering_key, later))
        return id

    def state_get(self, key: str) -> Entry | None:
        return self.state.get(key)

    def state_set(self, key: str, value: bytes) -> int:
        self._last_version += 1
        self.state[key] = Entry(value, self._last_version)
        return self._last_version

    def state_delete(self, key: str) -> bool:
        return self.state.pop(key, None) is not None

    def state_compare_and_set(self, key: str, expected: int | None, value: bytes) -> int:
        entry = self.state.get(key)
        current = entry.version if entry else None
        if current != expected:
            raise VersionMismatch(current)
        return self.state_set(key, value)

    def query(self, statement: str, params: tuple[Any, ...]) -> list[dict[str, Any]]:
        cursor = self._run(statement, params)
        columns = [column[0] for column in cursor.description or []]
        return [dict(zip(columns, row)) for row in cursor]

    def execute(self, statement: str, params: tuple[Any, ...]) -> int:
        return max(0, self._run(statement, params).rowcount)

    def defer(self, statement: str, params: tuple[Any, ...]) -> None:
        self._run(statement, params)

    def _run(self, statement: str, params: tuple[Any, ...]) -> sqlite3.Cursor:
        forms = [_values.encode(value)[1] for value in params]
        # The module reads `$1` as a name, and `?1` as a number.
        statement = re.sub(r"\$(\d+)", r"?\1", statement)
        try:
            return self.database.execute(statement, forms)
        except sqlite3.IntegrityError as error:
            code = str(getattr(error, "sqlite_errorcode", 19))
            raise sql.ConstraintViolation(str(error), code=code, constraint=None) from error
        except sqlite3.Error as error:
            raise sql.SqlError("query-failed", str(error)) from error

    def dialect(self) -> str:
        return "sqlite"

    def cache_get(self, key: str) -> bytes | None:
        return self.cache.get(key)

    def cache_put(self, key: str, value: bytes, ttl: int, tags: list[str]) -> None:
        self.cache[key] = value

    def cache_invalidate(self, tags: list[str]) -> None:
        self.cache.clear()

    def config_get(self, key: str) -> str | None:
        return self.config.get(key)

    def invocation_id(self) -> str:
        return f"worker:{self._message.id if self._message else ''}"

    def worker(self) -> str:
        return "worker"

    def version(self) -> int:
        return 1

    def attempt(self) -> int:
        return self.attempt_is

    def max_attempts(self) -> int:
        return 10

    def now(self) -> datetime:
        return self.now_is

    def remaining(self) -> timedelta:
        return timedelta(seconds=10)

    def traceparent(self) -> str | None:
        return self._message.header("traceparent") if self._message else None


@contextmanager
def host(*, migrations: str | Path | None = None) -> Iterator[Host]:
    """A fresh host. `migrations` is the worker's folder of SQL files, which run in order."""
    database = sqlite3.connect(":memory:", isolation_level=None)
    for file in sorted(Path(migrations).glob("*.sql")) if migrations else []:
        database.executescript(file.read_text(encoding="utf-8"))
    fresh = Host(database)
    before = _backend.replace(fresh)
    try:
        yield fresh
    finally:
        _backend.replace(before)
        database.close()
