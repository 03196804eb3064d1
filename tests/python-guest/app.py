"""The behaviours of the conformance suite in Python; `tests/guests` has them in Rust.

The behaviour is in the header `do`. Several names, separated by commas, run in sequence. The body may
hold their options as JSON.
"""

import os
from typing import Any

import oncely
from oncely import Message, Reject, Retry, RetryAfter, invocation, outbox, sql, state


@oncely.handler
def handle(message: Message) -> None:
    for behaviour in (message.header("do") or "").split(","):
        BEHAVIOURS[behaviour.strip()](message)


def options(message: Message) -> dict[str, Any]:
    return message.json() if message.body else {}


def insert(message: Message) -> None:
    given = {"from": "a", "to": "b", "delta": 1, "n": 1, "subject": "out.effect"} | options(message)
    nonce = os.urandom(16).hex()
    sql.execute(
        "insert into effect (event_id, account, delta, attempt_nonce) values ($1, $2, $3, $6), ($1, $4, $5, $6)",
        message.id,
        given["from"],
        -given["delta"],
        given["to"],
        given["delta"],
        nonce,
    )
    for ordinal in range(given["n"]):
        outbox.send(given["subject"], {"event_id": message.id, "ordinal": ordinal})


def defer(message: Message) -> None:
    for statement in options(message)["statements"]:
        sql.defer(statement["sql"], *statement["params"])


def emit(message: Message) -> None:
    given = options(message)
    delay = given.get("delay_ms")
    outbox.send(
        given.get("subject", "out.x"),
        "0",
        ordering_key=given.get("ordering_key"),
        delay=None if delay is None else delay / 1000,
    )


def echo(message: Message) -> None:
    headers = [
        (name, value)
        for name, value in message.headers
        if not name.startswith(("Nats-", "Oncely-"))
    ]
    outbox.send("out.echo", message.body, headers=headers)


def fail_until(message: Message) -> None:
    given = options(message)
    attempt = invocation.attempt()
    if attempt >= given.get("attempt", 2):
        return
    text = f"requested failure of attempt {attempt}"
    if given.get("after_ms") is not None:
        raise RetryAfter(given["after_ms"] / 1000, text, code="requested-failure")
    raise Retry(text, code="requested-failure")


def reject(message: Message) -> None:
    raise Reject("requested reject", code="requested-reject")


def panic(message: Message) -> None:
    raise ValueError("requested panic")


def state_counter(message: Message) -> None:
    entry = state.get("counter")
    value = (int(entry.value) if entry else 0) + 1
    version = state.set("counter", str(value))
    outbox.send("out.state", {"value": value, "version": version}, ordering_key="counter")


def state_cas(message: Message) -> None:
    given = {"key": "cas", "expected": None, "value": "x"} | options(message)
    try:
        version = state.compare_and_set(given["key"], given["expected"], given["value"])
    except state.VersionMismatch as error:
        raise Reject(str(error), code="version-mismatch") from None
    outbox.send("out.state", {"key": given["key"], "version": version})


def sql_values(message: Message) -> None:
    given = options(message)
    row = sql.query_one(given["select"])
    assert row is not None
    [texts] = sql.query(given["as_text"], *row.values())
    outbox.send("out.values", texts)


BEHAVIOURS = {
    function.__name__: function
    for function in (
        insert,
        emit,
        echo,
        fail_until,
        reject,
        panic,
        state_counter,
        state_cas,
        defer,
        sql_values,
    )
}
