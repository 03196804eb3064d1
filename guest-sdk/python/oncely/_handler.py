"""The decorators that make a function the handler of a component."""

import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Any

from . import _backend, _payload
from ._errors import Failure
from ._message import Message

Handle = Callable[..., None]
HandleBatch = Callable[[list[Message]], Sequence[Failure | None] | None]


def handler(function: Handle) -> Handle:
    """Makes a function the handler of its component: one message at a time.

    Its parameters may be a `Message` and a payload, in any order. The payload is read from a JSON
    body: a dataclass, or any type of `typing`. A body that does not fit is rejected with the code
    `malformed`. `bytes` and `str` take the body as it is.
    """
    arguments = _arguments(function)

    def handle(message: Message) -> None:
        function(*[argument(message) for argument in arguments])

    if _backend.IN_COMPONENT:
        from . import _wasm

        function.__globals__["Handler"] = _wasm.handler_class(handle)
    handle.__name__ = function.__name__
    handle.__doc__ = function.__doc__
    handle.__wrapped__ = function
    return handle


def batch_handler(function: HandleBatch) -> HandleBatch:
    """Makes a function the handler of its component: the messages of a batch in one call.

    It returns `None` if all took effect, or one entry for each message, in order: `None`, or the
    `Failure` of that message. An exception fails the call as a whole.
    """
    if _backend.IN_COMPONENT:
        from . import _wasm

        function.__globals__["BatchHandler"] = _wasm.batch_handler_class(function)
    return function


def _arguments(function: Handle) -> list[Callable[[Message], Any]]:
    hints = typing.get_type_hints(function)
    parameters = list(inspect.signature(function).parameters.values())
    if not 1 <= len(parameters) <= 2:
        raise TypeError(
            f"{function.__name__} takes {len(parameters)} parameters: "
            "a message, a payload, or both are expected"
        )
    return [_argument(hints.get(parameter.name, Message)) for parameter in parameters]


def _argument(wanted: Any) -> Callable[[Message], Any]:
    if wanted is Message:
        return lambda message: message
    if wanted is bytes:
        return lambda message: message.body
    if wanted is str:
        return Message.text
    return lambda message: _payload.parse(message.body, wanted)
