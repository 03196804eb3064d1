"""The failures of a handler."""

from datetime import timedelta


class Failure(Exception):
    """Why a message could not be handled. The effects of the handler are rolled back.

    `code` is a short, stable name for this kind of failure, such as `card-declined`. Dead letters
    are grouped by it.
    """

    def __init__(self, message: str, *, code: str | None = None):
        super().__init__(message)
        self.message = message
        self.code = code


class Retry(Failure):
    """Retry after a backoff. After the last attempt the message becomes a dead letter."""


class RetryAfter(Failure):
    """Like `Retry`, but not before `delay` has passed; at most 24 hours."""

    def __init__(self, delay: timedelta | float, message: str, *, code: str | None = None):
        super().__init__(message, code=code)
        self.delay = delay if isinstance(delay, timedelta) else timedelta(seconds=delay)


class Reject(Failure):
    """Do not retry: the message becomes a dead letter at once."""
