"""The `[worker.config]` table of the manifest."""

from ._backend import backend


def get(key: str, default: str | None = None) -> str | None:
    """The value of a key, or `default`."""
    value = backend().config_get(key)
    return default if value is None else value
