"""A worker in Python that sends greetings and counts them by name."""

import json

from componentize_py_types import Err
from wit_world import exports
from wit_world.imports import outbox, state
from wit_world.imports.types import Failure, FailureKind_Reject, Message


class Handler(exports.Handler):
    def handle(self, message: Message) -> None:
        try:
            name = json.loads(message.body)["name"]
        except (ValueError, TypeError, KeyError) as error:
            # A dead letter at once. Any other exception traps and is retried, unless it repeats
            # exactly.
            raise Err(Failure(FailureKind_Reject(), "malformed", f"the body is not the expected JSON: {error!r}"))

        entry = state.get(f"greeted.{name}")
        times = (int(entry.value) if entry else 0) + 1
        state.set(f"greeted.{name}", str(times).encode())

        body = json.dumps({"greeting": f"Hello {name}", "times": times}).encode()
        outbox.send(outbox.Outgoing("greetings.sent", [], body, None, None, None, None))
