"""An HTTP worker in Python that uses only `wasi:http/proxy`."""

from componentize_py_types import Ok
from wit_world import exports
from wit_world.imports.types import (
    Fields,
    IncomingBody,
    IncomingRequest,
    OutgoingBody,
    OutgoingResponse,
    ResponseOutparam,
)


class IncomingHandler(exports.IncomingHandler):
    def handle(self, request: IncomingRequest, response_out: ResponseOutparam) -> None:
        body = read(request)
        response = OutgoingResponse(Fields.from_list([("x-from", b"python")]))
        response.set_status_code(201)
        outgoing = response.body()
        ResponseOutparam.set(response_out, Ok(response))
        with outgoing.write() as stream:
            stream.blocking_write_and_flush(b"you said " + body)
        OutgoingBody.finish(outgoing, None)


def read(request: IncomingRequest) -> bytes:
    body = b""
    with request.consume() as incoming, incoming.stream() as stream:
        try:
            while True:
                body += stream.blocking_read(4096)
        except Exception:
            return body
