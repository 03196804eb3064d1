"""Write message handlers for Oncely in Python.

    from dataclasses import dataclass
    import oncely
    from oncely import outbox, sql

    @dataclass
    class Order:
        id: str
        cents: int

    @oncely.handler
    def handle(order: Order) -> None:
        sql.execute("insert into orders (id, cents) values ($1, $2)", order.id, order.cents)
        outbox.send("orders.accepted", {"id": order.id})

The effects of `sql`, `state` and `outbox` belong to one database transaction. Returning commits
them, once. An exception rolls all of them back: `Reject` makes a dead letter at once, `Retry`,
`RetryAfter` and every other exception lead to another attempt.

Outside of WebAssembly the same module runs against `oncely.testing`.
"""

from . import _backend, cache, config, invocation, outbox, sql, state
from ._errors import Failure, Reject, Retry, RetryAfter
from ._handler import batch_handler, handler
from ._message import Message, Origin

if _backend.IN_COMPONENT:
    from . import _wasm

    _backend.replace(_wasm)

__all__ = [
    "Failure",
    "Message",
    "Origin",
    "Reject",
    "Retry",
    "RetryAfter",
    "batch_handler",
    "cache",
    "config",
    "handler",
    "invocation",
    "outbox",
    "sql",
    "state",
]
