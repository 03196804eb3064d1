"""Keyed values of this worker, in the same transaction."""

from typing import NamedTuple

from ._backend import backend


class Entry(NamedTuple):
    """A value with its version, which grows with each change of the key."""

    value: bytes
    version: int


class StateError(Exception):
    """A refused operation. `reason` is `invalid-key`, `too-large`, `transaction-failed` or `other`."""

    def __init__(self, reason: str, message: str):
        super().__init__(f"{reason}: {message}")
        self.reason = reason


class VersionMismatch(StateError):
    """`compare_and_set` found another version; `current` is `None` if the key does not exist."""

    def __init__(self, current: int | None):
        super().__init__("version-mismatch", f"the key has version {current}")
        self.current = current


def get(key: str) -> Entry | None:
    """The value under a key; `None` if the key does not exist."""
    return backend().state_get(key)


def set(key: str, value: bytes | str) -> int:
    """Sets a value and returns its new version."""
    return backend().state_set(key, _bytes(value))


def delete(key: str) -> bool:
    """Deletes a key. Returns false if it did not exist."""
    return backend().state_delete(key)


def compare_and_set(key: str, expected: int | None, value: bytes | str) -> int:
    """Sets a value only if the key still has the expected version. `None` expects a missing key."""
    return backend().state_compare_and_set(key, expected, _bytes(value))


def _bytes(value: bytes | str) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
