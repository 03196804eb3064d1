"""The host behind the functions of this package: Oncely in a component, a test otherwise."""

import importlib.util
from typing import Any

IN_COMPONENT = importlib.util.find_spec("wit_world") is not None
"""Whether this is a component: componentize-py adds the module of the interfaces."""

_current: Any = None


def backend() -> Any:
    """The current host."""
    if _current is None:
        raise RuntimeError(
            "there is no host here: run the handler inside `with oncely.testing.host() as host:`"
        )
    return _current


def replace(host: Any) -> Any:
    """Sets the host and returns the one before."""
    global _current
    before, _current = _current, host
    return before
