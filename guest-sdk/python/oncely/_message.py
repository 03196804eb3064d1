"""Messages."""

import json
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ._errors import Reject


@dataclass(frozen=True)
class Origin:
    """A position on a stream."""

    stream: str
    sequence: int
    stored_at: datetime


@dataclass(frozen=True)
class Message:
    """One message, as stored on its stream."""

    id: str
    """The event id, which identifies copies of the same event."""
    subject: str
    body: bytes
    headers: list[tuple[str, str]] = field(default_factory=list)
    """Names and values, in order. A name may appear more than once."""
    origin: Origin | None = None

    def header(self, name: str) -> str | None:
        """The first value of a header, regardless of case."""
        wanted = name.lower()
        return next((value for key, value in self.headers if key.lower() == wanted), None)

    def header_values(self, name: str) -> list[str]:
        """All values of a header, in order."""
        wanted = name.lower()
        return [value for key, value in self.headers if key.lower() == wanted]

    def text(self) -> str:
        """The body as UTF-8. Rejects the message if it is not."""
        try:
            return self.body.decode()
        except UnicodeDecodeError as error:
            raise Reject(f"the body is not UTF-8: {error}", code="malformed") from None

    def json(self) -> Any:
        """The body as JSON. Rejects the message if it is not."""
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise Reject(f"the body is not JSON: {error}", code="malformed") from None
