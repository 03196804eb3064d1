"""A worker in Python that sends greetings and counts them by name."""

from dataclasses import dataclass

import oncely
from oncely import outbox, state


@dataclass
class Request:
    name: str


@oncely.handler
def handle(request: Request) -> None:
    key = f"greeted.{request.name}"
    entry = state.get(key)
    times = (int(entry.value) if entry else 0) + 1
    state.set(key, str(times))
    outbox.send("greetings.sent", {"greeting": f"Hello {request.name}", "times": times})
