"""A cache for values that are cheap to recompute. It is not part of the transaction: never base a
decision about money, or any other invariant, on it."""

from collections.abc import Iterable
from datetime import timedelta

from ._backend import backend


class CacheError(Exception):
    """A refused operation. The handler may continue."""

    def __init__(self, reason: str, message: str):
        super().__init__(f"{reason}: {message}")
        self.reason = reason


def get(key: str) -> bytes | None:
    """The value under a key, if it exists and is valid."""
    return backend().cache_get(key)


def put(key: str, value: bytes, *, ttl: timedelta | float, tags: Iterable[str] = ()) -> None:
    """Stores a value after the commit, for at most `ttl` (a number in seconds)."""
    seconds = ttl.total_seconds() if isinstance(ttl, timedelta) else ttl
    backend().cache_put(key, value, round(seconds * 1000), list(tags))


def invalidate(*tags: str) -> None:
    """Drops all values of this worker that have one of these tags, on all hosts, after the commit."""
    backend().cache_invalidate(list(tags))
