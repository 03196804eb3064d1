//! The codes that the host gives to failures of handlers. A handler has codes of its own besides.

use super::explanation::codes;

codes! {
    /// A code of the host for a failed call.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum FailureCode {
        Trap: "trap",
            "The handler panicked, had an uncaught exception, exited, or trapped in another way.",
            "Read the detail and the frames, fix the handler, deploy it, and redrive.";
        StackOverflow: "stack-overflow",
            "The handler recursed too deep.",
            "Fix the recursion; the frames name the functions.";
        OutOfMemory: "out-of-memory",
            "The handler requested more memory than its limit.",
            "Use less memory, or raise `memory` under `[worker.limits]`.";
        Timeout: "timeout",
            "The handler ran longer than its limit. Time of statements counts.",
            "Find the slow statement or loop, or raise `time` under `[worker.limits]`.";
        ConstraintViolation: "constraint-violation",
            "A statement violated a constraint of a table.",
            "Check before the statement, use `on conflict`, or correct the message.";
        Conflict: "conflict",
            "Another transaction interfered. No attempt is counted.",
            "Nothing: the host runs the handler again. If it is frequent, set an ordering key.";
        Sql: "sql",
            "The database refused a statement for another reason than a constraint.",
            "Read the detail, and correct the statement or the migration.";
        CommitRefused: "commit-refused",
            "The database refused the commit, for example because of a deferred constraint.",
            "Read the detail, and correct the rows that the handler writes.";
        ConnectionBroken: "connection-broken",
            "The database connection broke repeatedly during the statements of this message alone.",
            "Read the log of the database; a statement probably ends its own session.";
        OutputRefused: "output-refused",
            "The handler sent an output that its manifest or its limits do not permit.",
            "Add the subject to `outputs`, or correct the output; the detail has the rule.";
        Schema: "schema",
            "The message does not fit the JSON Schema of its subject. The handler did not run.",
            "Correct the publisher or the schema; the detail names the field.";
        WrongResultCount: "wrong-result-count",
            "A batch handler returned more or fewer results than it received messages.",
            "Return one result for each message, in the same order.";
        Nak: "nak",
            "The component called `nak` of its JetStream interface.",
            "Find the reason in the log of the handler.";
        Term: "term",
            "The component called `term` of its JetStream interface. The message is not retried.",
            "Find the reason in the log of the handler.";
        NoRequest: "no-request",
            "A component that answers requests received a message.",
            "Give the worker routes in place of a stream.";
        NoResponse: "no-response",
            "The handler of a request returned without a response.",
            "Set a response on every path of the handler.";
        ErrorResponse: "error-response",
            "The handler of a request returned an error code in place of a response.",
            "Return a response with a status from 400 on.";
        UnfinishedResponse: "unfinished-response",
            "The handler of a request returned before the body of its response was complete.",
            "Finish the body before the handler returns.";
        StatusRefused: "status-refused",
            "The response has a status below 200 or above 599.",
            "Return a final status.";
        ResponseTooLarge: "response-too-large",
            "The body of the response exceeds its limit, or cannot be read.",
            "Return less, or raise `response_size` under `[worker.limits]`.";
    }
}
