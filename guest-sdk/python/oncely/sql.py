"""The worker's own tables, in the same transaction. Placeholders are `$1`, `$2`, ...

Values are `None`, `bool`, `int`, `float`, `Decimal`, `str`, `bytes`, `UUID`, aware `datetime`, `date`
and `time`; a `dict` or a `list` is JSON. An error from the database fails the whole message, even if
it is caught. For an expected conflict, use a statement that does not fail, such as
`insert ... on conflict do nothing`, and check the number of rows.
"""

from typing import Any

from ._backend import backend


class SqlError(Exception):
    """A failed statement.

    `reason` is `query-failed`, `not-allowed`, `invalid-parameter`, `unsupported-type`, `too-large`,
    `timeout`, `transaction-failed` or `other`. `code` is the SQLSTATE on PostgreSQL, the extended
    result code on SQLite.
    """

    def __init__(self, reason: str, message: str, *, code: str | None = None):
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.code = code


class ConstraintViolation(SqlError):
    """A violated constraint; `constraint` is its name, where the database tells it."""

    def __init__(self, message: str, *, code: str, constraint: str | None):
        super().__init__("constraint-violation", message, code=code)
        self.constraint = constraint


class Conflict(SqlError):
    """A conflict with another transaction. The host runs the message again; no attempt is spent."""

    def __init__(self, message: str, *, code: str):
        super().__init__("conflict", message, code=code)


def query(statement: str, *params: Any) -> list[dict[str, Any]]:
    """Runs a statement and returns its rows, each as a `dict` by column."""
    return backend().query(statement, params)


def query_one(statement: str, *params: Any) -> dict[str, Any] | None:
    """The first row of a query; `None` if there is none."""
    rows = query(statement, *params)
    return rows[0] if rows else None


def execute(statement: str, *params: Any) -> int:
    """Runs a statement and returns the number of changed rows."""
    return backend().execute(statement, params)


def defer(statement: str, *params: Any) -> None:
    """Runs a statement later, without a result: before the next `query` or `execute`, and in any
    case before the commit.

    The deferred statements of many messages reach the database together. An error from the
    database fails the message, and is raised by its next statement.
    """
    backend().defer(statement, params)


def dialect() -> str:
    """`postgres` or `sqlite`."""
    return backend().dialect()
