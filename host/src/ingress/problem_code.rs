//! The codes of error responses of the ingress.

use crate::model::explanation::codes;

codes! {
    /// The last part of a problem's type.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum ProblemCode {
        KeyMissing: "idempotency-key-missing",
            "400: the route requires an `Idempotency-Key`, and the request has none.",
            "Send one key for each operation, the same for each retry.";
        KeyInvalid: "idempotency-key-invalid",
            "400: the `Idempotency-Key` is empty, repeated, malformed or longer than 255 bytes.",
            "Send one printable key of 1 to 255 bytes.";
        KeyReused: "idempotency-key-reused",
            "422: the key was used for a request with another method, path, query or body.",
            "Use a new key for another operation.";
        InProgress: "request-in-progress",
            "409: a request with this key is still in progress.",
            "Retry after `Retry-After` with the same key.";
        NoSuchRoute: "no-such-route",
            "404: no route matches the path.",
            "Correct the path, or deploy the worker that has the route.";
        MethodNotAllowed: "method-not-allowed",
            "405: the path does not allow the method.",
            "Use a method of the header `Allow`.";
        SubjectRefused: "subject-refused",
            "400 or 403: the subject is invalid, or may not be published to.",
            "Correct the subject, or add it to `http_publish` of the host.";
        NoStream: "no-stream",
            "404: no stream accepts the subject, so the message cannot be stored.",
            "Correct the subject, or create the stream.";
        HostRefused: "host-refused",
            "400: the request does not name exactly one host.",
            "Send one valid `Host` header.";
        CallerAmbiguous: "caller-ambiguous",
            "400: a header that identifies the caller occurs twice.",
            "Send `Authorization`, or the header of `http_caller`, once.";
        HeaderRefused: "header-refused",
            "400: a header cannot become a header of the message.",
            "Use another name, and values in UTF-8.";
        BodyRefused: "body-refused",
            "400: responses of this path are cached, so it takes no body.",
            "Send the request without a body.";
        RequestTorn: "request-torn",
            "400: the body ended early.",
            "Retry; a client or a proxy closes the connection early.";
        BodyTooLarge: "body-too-large",
            "413: the body exceeds the limit of the route or of the NATS server.",
            "Send less, or raise `body_size` of the route or `max_payload` of the server.";
        HeadersTooLarge: "headers-too-large",
            "431: the headers have more than 32 KiB together.",
            "Send fewer or shorter headers, cookies first.";
        RequestTimeout: "request-timeout",
            "408: the body arrived too slowly. The request had no effect.",
            "Retry on a better connection; see `http_body_timeout`.";
        Starting: "starting",
            "503: the host and its workers are starting. The request had no effect.",
            "Retry after `Retry-After`.";
        Paused: "paused",
            "503: an operator paused the worker of this route. The request had no effect.",
            "Retry after `Retry-After`; `oncely resume` ends the pause.";
        Busy: "busy",
            "503: too many requests wait, or the memory for bodies is used up. No effect.",
            "Retry after `Retry-After`; raise `concurrency` of the worker or `http_memory`.";
        Unavailable: "unavailable",
            "503: the database is unavailable, or conflicts persisted. The request had no effect.",
            "Retry after `Retry-After`; check the database.";
        OutcomeUnknown: "outcome-unknown",
            "500 or 503: the connection broke during the commit. The effects may be committed.",
            "With a key, retry with it. Without one, check before you retry.";
        HandlerFailed: "handler-failed",
            "500: the handler trapped, broke a rule, or ignored a failed statement. No effect.",
            "Read the log of the host: the line `request failed` has the cause.";
        HandlerTimeout: "handler-timeout",
            "504: the handler ran out of time. The request had no effect.",
            "Make the handler faster, or raise `time` under `[worker.limits]`.";
    }
}
