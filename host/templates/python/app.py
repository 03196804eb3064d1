"""Accepts orders: stores each one, and sends a message about it."""

import logging
from dataclasses import dataclass

import oncely
from oncely import Reject, outbox, sql


@dataclass
class Order:
    """The body of a message on `{{name}}.new`."""

    id: str
    cents: int


@oncely.handler
def handle(order: Order) -> None:
    """The effects of this function are committed together, once, when it returns."""
    if order.cents <= 0:
        raise Reject("an order needs a positive amount", code="malformed")
    statement = "insert into orders (id, cents) values ($1, $2) on conflict do nothing"
    if sql.execute(statement, order.id, order.cents) == 0:
        logging.info("order %s came in another message before", order.id)
        return
    outbox.send("{{name}}.accepted", {"id": order.id})
    logging.info("accepted order %s", order.id)
